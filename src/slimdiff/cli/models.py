"""What MODEL stands for on the command line, and loading it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimdiff.cli import console
from slimdiff.errors import SlimdiffError
from slimdiff.plan import Plan
from slimdiff.prompts import read_prompts

BUNDLED = "scenes-unet"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PLAN_FILE = "slimdiff.json"
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Source:
    """A model as the command line names it.

    Attributes:
        name: what to call it, without folders.
        path: a folder, or a hub id as it is.
        bundled: whether it comes with slimdiff, so that prompts of its own are known.
        guidance: the guidance scale that it is meant for; None is its pipeline's own.
        text_tokens: the `max_sequence_length` that it is meant for; None is its pipeline's own.
    """

    name: str
    path: str
    bundled: bool = False
    guidance: float | None = None
    text_tokens: int | None = None


def source(model: str | None) -> Source:
    """Where MODEL is.

    Raises:
        SlimdiffError: neither a folder, nor a bundled reference, nor a possible hub id.
    """
    name = BUNDLED if model is None else model
    if Path(name).is_dir():
        return _folder(Path(name))
    from slimdiff.reference.bundled import REFERENCES, bundled_path

    if name in REFERENCES:
        from slimdiff.reference.references import sampling_of

        own = sampling_of(name)
        how = (own.get("guidance_scale"), own.get("max_sequence_length"))
        return Source(name, str(bundled_path(name)), True, *how)
    if not HUB_ID.fullmatch(name):
        raise SlimdiffError(
            f"{name}: no such folder; expected a diffusers folder, a hub id such as owner/name, "
            f"or a bundled reference ({', '.join(REFERENCES)})"
        )
    return Source(name.split("/")[-1], name)


def load(where: Source, dtype: str, device: str, variant: str | None = None) -> Any:
    """The pipeline, dense or slim, on its device.

    Raises:
        SlimdiffError: it cannot be loaded; an unknown dtype or device.
    """
    place = _device(device)
    kind = _dtype(dtype, place, where, variant)
    console.quiet_libraries()
    from slimdiff.checkpoint import load_pipeline

    try:
        pipe = load_pipeline(where.path, torch_dtype=kind, variant=variant)
    except SlimdiffError:
        raise
    except (OSError, ValueError) as error:
        raise SlimdiffError(
            f"{where.path}: cannot be loaded ({error}); expected a diffusers folder, a hub id, or "
            f"a bundled reference"
        ) from error
    pipe.set_progress_bar_config(disable=not console.is_verbose())
    return pipe.to(place)


def folder_of(where: Source, name: str, module: Any) -> Path:
    """The folder of one component; of a hub id the copy that diffusers remembers."""
    folder = Path(where.path) / name
    if folder.is_dir():
        return folder
    origin = Path(str(getattr(module.config, "_name_or_path", "")) or "missing")
    return origin / name if (origin / name).is_dir() else origin


def sampling(
    where: Source, guidance: float | None, text_tokens: int | None, pipe: Any = None
) -> dict[str, Any]:
    """`guidance_scale` and `max_sequence_length` to sample with: as asked, as the reference is
    meant for, or as a slim pipeline was calibrated; None is the pipeline's own."""
    found = [plan.figures.get("calibration", {}) for plan in _plans(where, pipe)]
    config = found[0].get("config", {}) if found else {}
    chosen = {
        "guidance_scale": (guidance, where.guidance),
        "max_sequence_length": (text_tokens, where.text_tokens),
    }
    return {
        name: next((value for value in values if value is not None), config.get(name))
        for name, values in chosen.items()
    }


def _plans(where: Source, pipe: Any) -> list[Plan]:
    """Those of slim components, of a pipeline or, while it is not loaded, of its folder."""
    from slimdiff.denoiser import ENCODERS, NAMES, slim_components

    if pipe is None:
        files = [Path(where.path) / name / PLAN_FILE for name in (*NAMES, *ENCODERS)]
        return [Plan.read(file) for file in files if file.is_file()]
    records = [getattr(module, "slim_record", None) for module in slim_components(pipe).values()]
    return [record.plan for record in records if record]


def prompts(where: Source, path: Path | None, n: int | None, split: str) -> list[str]:
    """The first `n` prompts of a file (None: all), or without one the bundled reference's own.

    Raises:
        SlimdiffError: no file for a model that has no prompts of its own; an unusable file.
    """
    if n is not None and n < 1:
        raise SlimdiffError(f"--num-prompts must be at least 1, got {n}")
    if path is not None:
        return read_prompts(path)[:n]
    if not where.bundled or n is None:
        raise SlimdiffError(
            f"{where.name}: give --prompts FILE, one prompt per line, of the kind that the model "
            f"will be used for; a few hundred are enough"
        )
    from slimdiff.reference.references import reference

    return reference(where.name).world.prompts(split, n)


def _folder(path: Path) -> Source:
    if not (path / "model_index.json").is_file():
        raise SlimdiffError(
            f"{path}: has no model_index.json; expected the folder of a whole pipeline, as "
            f"save_pretrained writes it"
        )
    return Source(path.resolve().name, str(path))


def _device(device: str) -> Any:
    import torch

    if device == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise SlimdiffError(f"--device {device}: {first}; --device cpu always works") from error


def _dtype(dtype: str, device: Any, where: Source, variant: str | None) -> Any:
    import torch

    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else _half(where, variant)
    if dtype not in DTYPES:
        raise SlimdiffError(f"--dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def _half(where: Source, variant: str | None) -> Any:
    """bfloat16 for a denoiser that is stored so, whose numbers may be beyond float16's."""
    import torch

    from slimdiff.denoiser import NAMES
    from slimdiff.stored import stored_dtypes

    found = [stored_dtypes(Path(where.path) / name, variant) for name in NAMES]
    brain = any(torch.bfloat16 in kinds.values() for kinds in found)
    return torch.bfloat16 if brain else torch.float16
