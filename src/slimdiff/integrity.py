"""What is checked before a denoiser is saved, and before a saved one is believed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from slimdiff.errors import SlimdiffError
from slimdiff.folders import read_json, reading
from slimdiff.groups import FACTORED
from slimdiff.plan import Plan, SlimRecord

WEIGHTS = "diffusion_pytorch_model"
ENCODER_WEIGHTS = "model"
CONFIG_FILE = "config.json"
INDEX_FILE = "model_index.json"


def check_savable(denoiser: nn.Module) -> None:
    """Refuse weights that would not load again.

    Raises:
        SlimdiffError: offloaded weights, an attached adapter, fused projections.
    """
    for name, module in denoiser.named_modules():
        if getattr(module, "fused_projections", False):
            raise SlimdiffError(
                f"{name}: projections are fused; call pipe.unfuse_qkv_projections() before saving"
            )
    for name, tensor in denoiser.state_dict().items():
        if tensor.is_meta:
            raise SlimdiffError(
                f"{name}: its weight is offloaded; call pipe.remove_all_hooks() and load the "
                f"pipeline without offloading before saving"
            )
        if any(part in name for part in (".lora_", ".base_layer.", ".processor.")):
            raise SlimdiffError(
                f"{name}: an adapter is attached; before saving, call pipe.fuse_lora() to keep a "
                f"LoRA, then pipe.unload_lora_weights() and pipe.unload_ip_adapter()"
            )


def verify_manifest(folder: Path) -> None:
    """Compare the files of a slim denoiser's folder with its manifest.

    Raises:
        SlimdiffError: no manifest, or one of another version; a missing, truncated, altered or
            unlisted file.
    """
    from slimdiff.slim_denoiser import MANIFEST_FILE, VERSION

    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise SlimdiffError(
            f"{path}: no such file; copy the whole folder, or pass verify=False to load without it"
        )
    manifest = read_json(path)
    if manifest.get("version") != VERSION or not isinstance(manifest.get("files"), dict):
        raise SlimdiffError(
            f"{path}: manifest version {manifest.get('version')!r}, this slimdiff reads {VERSION}; "
            f"upgrade slimdiff"
        )
    for name, expected in manifest["files"].items():
        _verify_file(folder / name, expected)
    strange = {p.name for p in folder.glob("*.safetensors")} - set(manifest["files"])
    if strange:
        raise SlimdiffError(
            f"{folder / min(strange)}: is not in {MANIFEST_FILE}; remove it, or pass verify=False "
            f"if you put it there"
        )


def _verify_file(path: Path, expected: dict[str, Any]) -> None:
    from slimdiff.slim_denoiser import fingerprint

    if not path.is_file():
        raise SlimdiffError(f"{path}: no such file, but the manifest lists it; copy it again")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise SlimdiffError(
            f"{path}: has {size:,} bytes, the manifest says {expected['bytes']:,}; was it "
            f"truncated? Copy it again"
        )
    if fingerprint(path) != expected:
        raise SlimdiffError(
            f"{path}: was altered since it was saved (SHA-256 differs); copy it again, or pass "
            f"verify=False if you altered it"
        )


def config_of(folder: Path) -> dict[str, Any]:
    """The config of the denoiser in `folder`.

    Raises:
        SlimdiffError: no such folder, or not a denoiser's.
    """
    if not folder.is_dir():
        raise SlimdiffError(f"{folder}: no such folder")
    if (folder / INDEX_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        raise SlimdiffError(
            f"{folder}: holds a whole pipeline; use load_pipeline, or name its denoiser's folder"
        )
    return read_json(folder / CONFIG_FILE)


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether it is the config of a model of transformers: a text encoder."""
    return "_class_name" not in config and bool(config.get("architectures"))


def class_name(config: Mapping[str, Any]) -> str:
    """The class that a config of diffusers or of transformers names."""
    return str(config["architectures"][0] if is_encoder(config) else config.get("_class_name"))


def encoder_class_of(config: Mapping[str, Any], folder: Path) -> Any:
    """The class of a text encoder: slimdiff's own slim class, or one of transformers.

    Raises:
        SlimdiffError: neither; or a slim config of another version.
    """
    import transformers

    from slimdiff import slim_text_encoder

    name, slim = class_name(config), "slimdiff" in config
    found = getattr(slim_text_encoder if slim else transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise SlimdiffError(
            f"{folder / CONFIG_FILE}: architectures is {name!r}, which is no "
            f"{'slim ' if slim else ''}model class of transformers {transformers.__version__}; "
            f"upgrade transformers, or save the model again"
        )
    if slim:
        with reading(folder):
            slim_text_encoder.check_slim(config["slimdiff"], CONFIG_FILE)
    return found


def class_of(config: Mapping[str, Any], folder: Path) -> Any:
    """The class that the config names: slimdiff's own slim class, or one of diffusers.

    Raises:
        SlimdiffError: neither; or a slim config of another version.
    """
    import diffusers

    from slimdiff import slim_denoiser

    name, slim = class_name(config), "slimdiff" in config
    found = getattr(slim_denoiser if slim else diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        raise SlimdiffError(
            f"{folder / CONFIG_FILE}: _class_name is {name!r}, which is no "
            f"{'slim ' if slim else ''}model class of diffusers {diffusers.__version__}; upgrade "
            f"diffusers, or save the model again"
        )
    if slim:
        with reading(folder):
            slim_denoiser.check_slim(config["slimdiff"], CONFIG_FILE)
    return found


def refuse_missing_weights(folder: Path, variant: str | None, weights: str = WEIGHTS) -> None:
    """Refuse a folder without safetensors of this variant; `weights` begins their names.

    Raises:
        SlimdiffError: names the file, and what is there instead.
    """
    stem = weights if variant is None else f"{weights}.{variant}"
    index = f"{weights}.safetensors.index{'' if variant is None else f'.{variant}'}.json"
    if not (folder / f"{stem}.safetensors").is_file() and not (folder / index).is_file():
        found = sorted(p.name for p in folder.glob(f"{weights}*"))
        raise SlimdiffError(
            f"{folder / stem}.safetensors: no such file (found: {', '.join(found) or 'none'}); "
            f"copy it, or give the variant that is there"
        )


def record_of(folder: Path, config: Mapping[str, Any]) -> SlimRecord | None:
    """The plan and the maps in a slim denoiser's folder; None if it was saved without.

    Raises:
        SlimdiffError: one of the two is missing, or the plan does not fit the config.
    """
    from safetensors.torch import load_file

    from slimdiff.slim_denoiser import MAPS_FILE, PLAN_FILE

    plan_path, maps_path = folder / PLAN_FILE, folder / MAPS_FILE
    if not plan_path.is_file() and not maps_path.is_file():
        return None
    plan = Plan.read(plan_path)
    _check_plan(plan, config, plan_path)
    if not maps_path.is_file():
        raise SlimdiffError(f"{maps_path}: no such file, but there is a {PLAN_FILE}; copy it too")
    with reading(maps_path):
        return SlimRecord(plan, load_file(str(maps_path)))


def _check_plan(plan: Plan, config: Mapping[str, Any], path: Path) -> None:
    """Refuse a plan whose widths are not those of the config."""
    slim = config["slimdiff"]
    wrong = None if class_name(config) == f"Slim{plan.denoiser}" else plan.denoiser
    other = sorted(set(plan.fused) ^ set(slim.get("fused_upsamplers", {})))
    wrong = wrong or (other[0] if other else None)
    for name, entry in plan.entries.items():
        if not entry.width:
            attention = entry.kind in ("query_key", "value_output")
            layer = name.rsplit(".", 1)[0] if attention else name
            wrong = wrong or (None if layer in slim.get("constants", {}) else name)
            continue
        if entry.kind == "feed_forward":
            layers = slim["linears"] | slim.get("convolutions", {})
            shapes = [s for p, s in layers.items() if f"{p}.".startswith(f"{name}.")]
            fits = any(entry.width in s for s in shapes) if shapes else entry.is_full
        elif entry.kind in FACTORED:
            rank = slim.get("factored", {}).get(name)
            fits = entry.is_full if rank is None else rank == entry.width
        elif entry.kind == "resnet":
            norms = [s for p, s in slim.get("norms", {}).items() if p.startswith(f"{name}.")]
            fits = any(entry.width in s for s in norms) if norms else entry.is_full
        else:
            layer, half = name.rsplit(".", 1)
            sizes = slim["attentions"].get(layer)
            kept = (entry.heads, entry.width)
            fits = entry.is_full if sizes is None else kept == (sizes["heads"], sizes.get(half))
        wrong = wrong or (None if fits else name)
    if wrong:
        raise SlimdiffError(
            f"{path}: does not fit {CONFIG_FILE} ({wrong} differs); it is the plan of another "
            f"model, copy the one that was saved with these weights"
        )
