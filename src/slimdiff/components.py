"""The components of a pipeline that can be slim: their classes, and reading them from a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimdiff.denoiser import ENCODERS, NAMES
from slimdiff.families import family_of
from slimdiff.folders import read_json, reading
from slimdiff.integrity import (
    CONFIG_FILE,
    ENCODER_WEIGHTS,
    INDEX_FILE,
    WEIGHTS,
    class_of,
    encoder_class_of,
    is_encoder,
    refuse_missing_weights,
    verify_manifest,
)

MODULES = ("slim_denoiser", "slim_text_encoder")
"""What model_index.json says that slim classes come from."""


def become_slim_(model: nn.Module, config: dict[str, Any]) -> None:
    """Give a live model, whose weights are narrow already, its slim class, in place."""
    from slimdiff import slim_denoiser, slim_text_encoder

    slim = slim_text_encoder if family_of(model).text else slim_denoiser
    slim.become_slim_(model, config)


def is_slim(index: Mapping[str, Any], name: str) -> bool:
    """Whether model_index.json says that a component is slim."""
    value = index.get(name)
    return isinstance(value, (list, tuple)) and value[0] in MODULES


def slim_names(folder: Path) -> list[str]:
    """The slim ones among the denoiser and the text encoders in a pipeline's folder."""
    index = read_json(folder / INDEX_FILE)
    return [
        name
        for name in (*NAMES, *ENCODERS)
        if is_slim(index, name)
        or ((config := folder / name / CONFIG_FILE).is_file() and "slimdiff" in read_json(config))
    ]


def read_component(
    folder: Path,
    config: Mapping[str, Any],
    torch_dtype: torch.dtype | None,
    device_map: Any,
    variant: str | None,
    verify: bool,
) -> tuple[Any, dict[str, Any]]:
    """A model, and which of its weights were missing or superfluous.

    Diffusers reads in float32 if no dtype is given, transformers in what it finds: here both do as
    diffusers.

    Raises:
        SlimdiffError: the folder is damaged, or its class unknown.
    """
    encoder = is_encoder(config)
    model_class = (encoder_class_of if encoder else class_of)(config, folder)
    if verify:
        verify_manifest(folder)
    refuse_missing_weights(folder, variant, ENCODER_WEIGHTS if encoder else WEIGHTS)
    dtype = {"dtype": torch_dtype or torch.float32} if encoder else {"torch_dtype": torch_dtype}
    with reading(folder):
        model, info = model_class.from_pretrained(
            str(folder),
            device_map=device_map,
            variant=variant,
            use_safetensors=True,
            output_loading_info=True,
            **dtype,
        )
    return model, info


def absent_components(folder: Path) -> dict[str, None]:
    """Components that a pipeline's folder was saved without though its class asks for them, such as
    SD3's T5 encoder.

    Diffusers loads such a folder when it is told of each that it is None.

    Raises:
        SlimdiffError: the folder has no index.
    """
    import diffusers

    index = read_json(folder / INDEX_FILE)
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    optional = getattr(pipeline, "_optional_components", ())
    absent = [name for name, value in index.items() if value == [None, None]]
    return dict.fromkeys(name for name in absent if name not in optional)


def loading_call(folder: str, absent: Iterable[str]) -> str:
    """How plain diffusers loads a pipeline's folder."""
    more = "".join(f", {name}=None" for name in absent)
    return f'DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True{more})'
