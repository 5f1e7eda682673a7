"""The components of a pipeline that can be slim: their classes, and reading them from a folder."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimdiff.denoiser import ENCODERS, NAMES
from slimdiff.errors import SlimdiffError
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

MODULE = re.compile(r"slim_(denoiser|text_encoder)(_[0-9a-f]{6})?")
"""What model_index.json says that slim classes come from: a file, named by a hash of its content.

Releases before that named it without the hash.
"""


def become_slim_(model: nn.Module, config: dict[str, Any]) -> None:
    """Give a live model, whose weights are narrow already, its slim class, in place."""
    from slimdiff import slim_denoiser, slim_text_encoder

    slim = slim_text_encoder if family_of(model).text else slim_denoiser
    slim.become_slim_(model, config)


def is_slim(index: Mapping[str, Any], name: str) -> bool:
    """Whether model_index.json says that a component is slim."""
    value = index.get(name)
    return isinstance(value, (list, tuple)) and bool(MODULE.fullmatch(str(value[0])))


@contextlib.contextmanager
def standing_in(index: Mapping[str, Any]) -> Iterator[None]:
    """Have this release's slim classes found under the names of the releases that saved a pipeline.

    diffusers looks the class of a component up even where the component is given to it.
    """
    from slimdiff import slim_denoiser, slim_text_encoder

    own = {"denoiser": slim_denoiser, "text_encoder": slim_text_encoder}
    names = {str(index[name][0]) for name in (*NAMES, *ENCODERS) if is_slim(index, name)}
    new = sorted(names - set(sys.modules))
    for name in new:
        stand_in = types.ModuleType(name)
        kind = MODULE.fullmatch(name)
        assert kind is not None, "is_slim matched it"
        stand_in.__getattr__ = functools.partial(getattr, own[kind[1]])  # type: ignore[method-assign]  # PEP 562
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name in new:
            sys.modules.pop(name, None)


def refuse_code(where: str | Path, index: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse a pipeline whose own class, or that of a component, is code beside its weights.

    Args:
        where: its folder or hub id.
        index: its model_index.json.
        options: for diffusers; what is given there, or trusted, is not looked at.

    Raises:
        SlimdiffError: names the file.
    """
    if options.get("trust_remote_code") or "custom_pipeline" in options:
        return
    libraries = {
        name: value[0] for name, value in index.items() if isinstance(value, (list, tuple))
    }
    pipeline = libraries.pop("_class_name", None)
    files = {} if pipeline is None else {"the pipeline's class": f"{pipeline}.py"}
    for name, library in libraries.items():
        file = f"{name}/{library}.py"
        if name not in options and not is_slim(index, name) and Path(where, file).is_file():
            files[name] = file
    for what, file in files.items():
        raise SlimdiffError(
            f"{where}: cannot be loaded: {what} is code, {file}, and slimdiff runs none of a "
            f"folder; if you trust it, load the pipeline in Python with "
            f"diffusers.DiffusionPipeline.from_pretrained(..., trust_remote_code=True) and give it "
            f"to slimdiff.compress"
        )


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
