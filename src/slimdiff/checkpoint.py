"""Saving and loading slim denoisers and pipelines: safetensors and JSON, strict and atomic.

A saved folder loads in plain diffusers. Loading it here runs no code from it, and compares every
file of the denoiser with the sums in `slimdiff_manifest.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimdiff.components import (
    absent_components,
    is_slim,
    read_component,
    refuse_code,
    slim_names,
    standing_in,
)
from slimdiff.denoiser import ENCODERS, NAMES, denoiser_of, slim_components
from slimdiff.errors import SlimdiffError
from slimdiff.folders import read_json, reading, replacing
from slimdiff.integrity import (
    CONFIG_FILE,
    ENCODER_WEIGHTS,
    INDEX_FILE,
    WEIGHTS,
    check_savable,
    config_of,
    record_of,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
_PICKLES = ["*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5", "*.onnx*"]


def save(
    denoiser: nn.Module,
    out: str | Path,
    *,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> Path:
    """Write `denoiser` to folder `out`, whole or not at all, and return `out`.

    Args:
        denoiser: or a text encoder, slim or dense; a slim one is saved with its plan and maps.
        out: a new folder, an empty one, or that of a denoiser, which is replaced.
        variant: as in diffusers: `fp16` names the weights `diffusion_pytorch_model.fp16.*`.
        max_shard_size: larger weights are split.

    Raises:
        SlimdiffError: `out` holds something else, or the weights cannot be saved as they stand.
    """
    check_savable(denoiser)
    with replacing(out, CONFIG_FILE) as folder:
        _save(denoiser, folder, variant, max_shard_size)
    return Path(out)


def save_pipeline(
    pipe: Any,
    out: str | Path,
    *,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> Path:
    """Write a whole pipeline with a model card to folder `out`, or nothing; return `out`.

    Args:
        pipe: a diffusers pipeline whose denoiser and text encoders are slim or dense.
        out: a new folder, an empty one, or that of a pipeline, which is replaced.
        variant: as in diffusers; holds for all components.
        max_shard_size: larger weights are split.

    Raises:
        SlimdiffError: no denoiser; `out` holds something else; or the weights cannot be saved as
            they stand.
    """
    from slimdiff.model_card import write_model_card

    for name, module in {**dict([denoiser_of(pipe)]), **slim_components(pipe)}.items():
        check_savable(module)
        setattr(pipe, name, getattr(pipe, name))  # the pipeline notes the class that it has by now
    with replacing(out, INDEX_FILE) as folder:
        _save(pipe, folder, variant, max_shard_size)
        write_model_card(pipe, folder, Path(out).resolve().name)
    return Path(out)


def load(
    path: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    device_map: Any = None,
    variant: str | None = None,
    verify: bool = True,
) -> Any:
    """Load a denoiser or a text encoder, slim or dense; a slim one gets its `slim_record` back.

    Args:
        path: its own folder.
        torch_dtype, device_map, variant: as in diffusers.
        verify: compare the files of a slim denoiser with its manifest.

    Raises:
        SlimdiffError: a missing, truncated, altered or unlisted file, a plan or weights of another
            model, a version of the future; names the file.
    """
    folder = Path(path)
    config = config_of(folder)
    slim = config.get("slimdiff")
    how = (torch_dtype, device_map, variant, bool(slim and verify))
    model, info = read_component(folder, config, *how)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise SlimdiffError(
                f"{folder}: the weights do not fit {CONFIG_FILE} ({what}: {min(info[what])}); were "
                f"files of two models mixed?"
            )
    if slim and (record := record_of(folder, config)):
        model.slim_record = record
    return model


def load_pipeline(
    path: str | Path,
    *,
    torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    device_map: str | None = None,
    variant: str | None = None,
    verify: bool = True,
    **options: Any,
) -> Any:
    """Load a pipeline, slim or dense. No code from its folder runs, and nothing is unpickled.

    Args:
        path: a folder or a hub id.
        torch_dtype: one dtype, or dtypes by component, as in diffusers.
        device_map: `cpu` or the accelerator's name; None loads to the CPU.
        variant: as in diffusers.
        verify: see `load`.
        options: for `DiffusionPipeline.from_pretrained`, such as components of your own.

    Raises:
        SlimdiffError: as for `load`; no such pipeline; or a component that diffusers cannot load,
            for instance because it needs code from the folder.
    """
    from diffusers import DiffusionPipeline

    folder, index = _local(path, options), {}
    if folder is not None:
        index = read_json(folder / INDEX_FILE)
        refuse_code(path, index, options)
        for name in slim_names(folder):
            if name not in options:
                options[name] = _load_component(
                    folder / name, torch_dtype, device_map, variant, verify
                )
        options = absent_components(folder) | options
    settings = {"use_safetensors": True, "device_map": device_map, "variant": variant}
    with reading(path), standing_in(index):
        return DiffusionPipeline.from_pretrained(
            str(folder or path), **(settings | _dtype_option(torch_dtype) | options)
        )


def _save(model: Any, folder: Path, variant: str | None, max_shard_size: int | str) -> None:
    model.save_pretrained(
        str(folder), safe_serialization=True, variant=variant, max_shard_size=max_shard_size
    )


def _local(path: str | Path, options: dict[str, Any]) -> Path | None:
    """The folder of a pipeline; None for one on the hub that diffusers fetches and loads itself."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / INDEX_FILE).is_file():
            raise SlimdiffError(
                f"{folder}: has no {INDEX_FILE}; expected a pipeline's folder (slimdiff.load "
                f"loads a bare denoiser)"
            )
        return folder
    if not _HUB_ID.fullmatch(str(path)):
        raise SlimdiffError(f"{path}: no such folder; expected one, or a hub id like owner/name")
    return _download(str(path), options)


def _download(repo: str, options: dict[str, Any]) -> Path | None:
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    with reading(repo):
        index = DiffusionPipeline.load_config(repo, **hub)
        refuse_code(repo, index, options)
        if not any(is_slim(index, name) for name in (*NAMES, *ENCODERS)):
            return None
        for name in hub:
            del options[name]
        return Path(snapshot_download(repo, ignore_patterns=_PICKLES, **hub))


def _load_component(
    folder: Path, torch_dtype: Any, device_map: str | None, variant: str | None, verify: bool
) -> Any:
    if device_map == "balanced":
        raise SlimdiffError(
            f"{folder}: device_map 'balanced' is not possible with slim components; name one "
            f"device, or load without device_map and call pipe.enable_model_cpu_offload()"
        )
    if isinstance(torch_dtype, Mapping):
        torch_dtype = torch_dtype.get(folder.name, torch_dtype.get("default", torch.float32))
    stem = ENCODER_WEIGHTS if folder.name in ENCODERS else WEIGHTS
    if not any(folder.glob(f"{stem}.{variant}*")):
        variant = None  # like diffusers: a component without the variant is loaded as it is
    return load(
        folder, torch_dtype=torch_dtype, device_map=device_map, variant=variant, verify=verify
    )


def _dtype_option(dtype: Any) -> dict[str, Any]:
    """`dtype` under the name that pipelines of the installed diffusers want."""
    import diffusers

    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {} if dtype is None else {"dtype" if release >= (0, 42) else "torch_dtype": dtype}
