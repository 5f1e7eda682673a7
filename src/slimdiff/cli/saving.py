"""Saving what a command made: every tensor in the dtype that it was stored in, and read again."""

from __future__ import annotations

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
    refuse_other_weights(getattr(pipe, component), out / component, variant)
