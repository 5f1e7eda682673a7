"""Saving what a command made: every tensor in the dtype that it was stored in, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimdiff.cli import models


def folders(where: models.Source, pipe: Any, variant: str | None) -> dict[str, Path]:
    """Component -> the folder that it was read from; without those whose folder is not known."""
    from torch import nn

    from slimdiff.stored import weight_files

    found = {
        name: models.folder_of(where, name, module)
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module)
    }
    return {name: folder for name, folder in found.items() if weight_files(folder, variant)}


def save(
    pipe: Any, out: Path, origins: dict[str, Path], variant: str | None, component: str
) -> None:
    """Save the pipeline with the dtypes that its tensors had on disk, and read `component` again.

    Raises:
        SlimdiffError: a number is beyond its dtype; or what is on the disk is not what was saved.
    """
    from slimdiff.checkpoint import save_pipeline
    from slimdiff.stored import cast_, refuse_other_weights, saving_of, weight_files

    for name, folder in origins.items():
        module = getattr(pipe, name)
        dtypes = saving_of(module, folder, variant).dtypes
        cast_(module, dtypes, weight_files(folder, variant))
    save_pipeline(pipe, out, variant=variant)
    for name, folder in origins.items():
        if name != component:
            _keep_named_dtype(folder, out / name)
    refuse_other_weights(getattr(pipe, component), out / component, variant)


def _keep_named_dtype(origin: Path, saved: Path) -> None:
    """Have the configuration of a component name the dtype that its origin's names to load in.

    transformers writes that of the weights, and loads in it: a text encoder that was stored in 16
    bits but is to be loaded in 32 would no longer fit a denoiser that is loaded in 32.
    """
    files = [folder / "config.json" for folder in (origin, saved)]
    if not all(file.is_file() for file in files):
        return
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    if "dtype" in before and before["dtype"] != after.get("dtype"):
        text = json.dumps(after | {"dtype": before["dtype"]}, indent=2, sort_keys=True)
        files[1].write_text(text + "\n", encoding="utf-8")
