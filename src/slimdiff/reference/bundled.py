"""Where the bundled pipelines lie, and how to load them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

REFERENCES: tuple[str, ...] = ("scenes-unet", "scenes-dit", "scenes-dit-qknorm", "emoji-unet")
"""Names of the bundled reference pipelines."""


def bundled_path(name: str) -> Path:
    """Folder of a bundled pipeline, which `DiffusionPipeline.from_pretrained` takes."""
    if name not in REFERENCES:
        raise KeyError(f"no reference pipeline {name!r}; bundled: {', '.join(REFERENCES)}")
    return Path(__file__).parent / "pipelines" / name


def load_reference(name: str = "scenes-unet", dtype: Any = None) -> DiffusionPipeline:
    """A bundled pipeline on CPU, in `dtype` (float32 by default), its progress bar off.

    All make images of 64 by 64 pixels and are measured with 20 steps. Those of scenes take captions
    such as "a large red circle top left on navy background" at guidance 3: `scenes-unet` is a
    StableDiffusionPipeline, `scenes-dit` a StableDiffusion3Pipeline without a T5 encoder, which
    `max_sequence_length=1` makes fastest, and `scenes-dit-qknorm` the same with norms of queries
    and keys, as in SD3.5. `emoji-unet` is a StableDiffusionPipeline that takes captions such as
    "fluent red apple on navy background" at guidance 2. `slimdiff.reference.references.reference`
    knows each one's prompts, guidance and judge.

    Raises:
        KeyError: no such reference.
        FileNotFoundError: its folder holds no pipeline.
    """
    from slimdiff.checkpoint import load_pipeline

    path = bundled_path(name)
    if not (path / "model_index.json").exists():
        raise FileNotFoundError(
            f"{path} holds no pipeline; train one with `python -m slimdiff.reference.train` and "
            "package it with `python -m slimdiff.reference.export`"
        )
    pipe = load_pipeline(path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype is None else pipe.to(dtype)
