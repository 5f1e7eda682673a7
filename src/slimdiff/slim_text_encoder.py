"""Text encoders with narrow layers. Saved beside the weights, this file lets others load them:

    transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    diffusers.DiffusionPipeline.from_pretrained(pipeline_folder, trust_remote_code=True)

It needs torch and transformers alone. For a model class X of transformers with attention layers of
`ATTENTIONS`, `SlimX` is X with the widths that config.json holds under "slimdiff":

    {"version": 1,
     "linears": {"<path of a linear>": [in_features, out_features]},
     "attentions": {"<path of an attention layer>": {"heads": 8, "qk": 24, "vo": 24}}}

qk and vo are channels per head of queries and keys, and of values; both are the same.

Saved, it is named by a hash of its content (`MODULE`): two releases live side by side in a process,
and one release defines its classes once, however often it is loaded. Slim models can be pickled;
another process finds their classes where slimdiff is installed, or where the cache of modules that
this file was loaded from is on `sys.path`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import marshal
import os
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

VERSION = 1
PLAN_FILE = "slimdiff.json"
MAPS_FILE = "slimdiff_maps.safetensors"
MANIFEST_FILE = "slimdiff_manifest.json"

ATTENTIONS: dict[str, dict[str, Any]] = {
    "CLIPAttention": {
        "num_heads": lambda h, w: h,
        "head_dim": lambda h, w: w,
        "scale": lambda h, w: w**-0.5,
    },
    "T5Attention": {
        "n_heads": lambda h, w: h,
        "key_value_proj_dim": lambda h, w: w,
        "inner_dim": lambda h, w: h * w,
    },
}
"""Class of an attention layer -> attribute -> what it is for h heads of width w."""


def _digest(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()[:6]


_STEM = __name__.rpartition(".")[2]
MODULE = (
    f"slim_text_encoder_{_digest(Path(__file__).read_bytes())}"
    if _STEM == "slim_text_encoder"
    else _STEM
)
"""What this file is called where it is saved, and the module that slim classes say they are of."""

_FIRST = dict(vars(sys.modules[MODULE])) if MODULE in sys.modules else {}
"""What the first run of this file in this process defined; see the end of the file."""


class SlimConfigError(ValueError):
    """The slim config cannot be used: the message says why, and what to do."""


def check_slim(slim: Any, where: str) -> None:
    """Refuse what is not a slim config of this version; `where` stands for it in the message.

    Raises:
        SlimConfigError: it is not.
    """
    if not isinstance(slim, dict) or not {"version", "linears", "attentions"} <= set(slim):
        raise SlimConfigError(
            f"{where}: config.json has no slimdiff entry with version, linears and attentions; "
            f"save the model with slimdiff again"
        )
    if slim["version"] != VERSION:
        raise SlimConfigError(
            f"{where}: slim config version {slim['version']!r}, this code reads version {VERSION}; "
            f"upgrade slimdiff"
        )


def reshape_(model: nn.Module, slim: dict[str, Any]) -> nn.Module:
    """Give the layers that `slim` names their widths, in place, and return the model.

    Linears that have their shape already keep their weights; the others get new random ones of the
    same dtype and device.

    Raises:
        SlimConfigError: a layer is missing or of an unknown class, or widths contradict each other.
    """
    check_slim(slim, type(model).__name__)
    for path, (inputs, outputs) in slim["linears"].items():
        _resize(_layer(model, path, nn.Linear), inputs, outputs)
    for path, sizes in slim["attentions"].items():
        _set_widths(path, _layer(model, path, nn.Module), **sizes)
    return model


def become_slim_(model: Any, slim: dict[str, Any]) -> nn.Module:
    """Turn a live model, whose linears are narrow already, into its slim class, in place.

    One that is slim takes on another slim config. No weight is touched. Afterwards
    `model.config.slimdiff` is `slim`, and `save_pretrained` writes a folder that plain transformers
    loads. A pipeline that holds the model has noted its former
    class: assign the model again (`pipe.text_encoder = pipe.text_encoder`) before it is saved.

    Raises:
        SlimConfigError: as for `reshape_`; or a weight does not have the shape that `slim` says.
    """
    slim = json.loads(json.dumps(slim))
    found = slim_class(type(model))
    config = type(model.config).from_dict({**model.config.to_dict(), "slimdiff": slim})
    with torch.device("meta"):  # as it will be loaded; transformers learns of the class, too
        twin = found(config)
    live = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in twin.state_dict().items():
        if live.get(name) != tuple(tensor.shape):
            raise SlimConfigError(
                f"{name}: is {live.get(name)}, expected {tuple(tensor.shape)}; put the narrow "
                f"weights in first"
            )
    reshape_(model, slim)
    model.__class__ = found
    model.config.slimdiff = slim
    return model


def _layer(model: nn.Module, path: str, kind: type) -> Any:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, kind):
        raise SlimConfigError(
            f"{path}: {type(model).__name__} has no such {kind.__name__}; the slim config belongs "
            f"to another model, or was saved with another transformers than "
            f"{transformers.__version__}"
        )
    return layer


def _resize(linear: nn.Linear, inputs: int, outputs: int) -> None:
    if linear.weight.shape == (outputs, inputs):
        return
    linear.in_features, linear.out_features = inputs, outputs
    linear.weight = _empty_like(linear.weight, (outputs, inputs))
    if linear.bias is not None:
        linear.bias = _empty_like(linear.bias, (outputs,))
    linear.reset_parameters()


def _empty_like(parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)


def _set_widths(path: str, attention: nn.Module, heads: int, qk: int, vo: int) -> None:
    derived = ATTENTIONS.get(type(attention).__name__)
    if derived is None:
        raise SlimConfigError(
            f"{path}: is a {type(attention).__name__}, expected one of {', '.join(ATTENTIONS)}"
        )
    if qk != vo:
        raise SlimConfigError(
            f"{path}: queries and keys have width {qk}, values {vo}; expected the same, since a "
            f"text encoder's attention takes one width"
        )
    for name, linear in attention.named_children():
        inner = getattr(linear, "in_features" if name in ("out_proj", "o") else "out_features", 0)
        if isinstance(linear, nn.Linear) and inner != heads * qk:
            raise SlimConfigError(
                f"{path}.{name}: has {inner} inner channels, expected {heads} heads of {qk}; the "
                f"slim config contradicts itself or belongs to another model"
            )
    for name, value in derived.items():
        if not hasattr(attention, name):
            raise SlimConfigError(
                f"{path}: has no {name}; transformers {transformers.__version__} is not supported"
            )
        setattr(attention, name, value(heads, qk))


class SlimTextMixin:
    """What slim classes add to transformers: narrow layers, and files beside the weights."""

    MADE: tuple[Any, type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any object, but for its class, which no module has: a pickle says what makes it."""
        reduced = super().__reduce_ex__(protocol)
        made = vars(type(self)).get("MADE")  # what others derive from it is theirs to import
        return reduced if made is None else (_blank, made, *reduced[2:])

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # a mixin
        slim = getattr(config, "slimdiff", None)
        check_slim(slim, str(getattr(config, "_name_or_path", "") or type(self).__name__))
        reshape_(self, slim)  # type: ignore[arg-type]  # a mixin

    @functools.wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers; adds this file, the plan, the maps and the manifest."""
        folder, push = Path(save_directory), kwargs.pop("push_to_hub", False)
        source = Path(str(getattr(self.config, "_name_or_path", "") or "missing"))
        self.config.auto_map = {"AutoModel": f"{MODULE}.{type(self).__name__}"}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]  # a mixin
        if not is_main_process:
            return
        write_module(folder)
        _save_record(self, source, folder)
        write_manifest(folder)
        if push:
            self.push_to_hub(kwargs.get("repo_id", folder.name), token=kwargs.get("token"))


def _blank(make: Any, base: type) -> Any:
    kind = make(base)
    return kind.__new__(kind)


def write_module(folder: Path) -> None:
    """Write this file into a slim folder, in the place of another release's."""
    for path in folder.glob("slim_text_encoder*.py"):
        path.unlink()
    (folder / f"{MODULE}.py").write_bytes(_source())


def _source() -> bytes:
    """This file as it ran; of one that was altered, as it is now.

    Another process that loads it copies over it: what does not fit the name is read again.
    """
    for _ in range(20):
        source = Path(__file__).read_bytes()
        if _is_own(source):
            break
        time.sleep(0.05)
    return source


def _is_own(source: bytes) -> bool:
    return MODULE == f"slim_text_encoder_{_digest(source)}"


def _save_record(model: Any, source: Path, folder: Path) -> None:
    """Write the plan and the maps; a model that carries none keeps those it was loaded with."""
    record = getattr(model, "slim_record", None)
    if record is not None:
        from safetensors.torch import save_file

        (folder / PLAN_FILE).write_text(record.plan.to_json(), encoding="utf-8")
        maps = {
            name: (value.float() if value.is_floating_point() else value).cpu().contiguous().clone()
            for name, value in record.maps.items()
        }
        save_file(maps, str(folder / MAPS_FILE), metadata={"format": "pt"})
        return
    config = source / "config.json"
    known = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    for name in (PLAN_FILE, MAPS_FILE):
        if not (source / name).is_file() or known.get("slimdiff") != model.config.slimdiff:
            (folder / name).unlink(missing_ok=True)
        elif source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


def write_manifest(folder: Path) -> None:
    """List sizes and SHA-256 sums of the weights, the maps, the plan, the config and this file."""
    fixed = {PLAN_FILE, "config.json", f"{MODULE}.py"}
    names = sorted({p.name for p in folder.glob("*.safetensors")} | fixed)
    files = {name: _fingerprint(folder / name) for name in names if (folder / name).is_file()}
    text = json.dumps({"version": VERSION, "files": files}, indent=1) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def slim_class(base: Any) -> Any:
    """The slim subclass of a transformers model class, always the same; a slim class is its own.

    Raises:
        TypeError: not a model class that transformers exports.
    """
    if issubclass(base, SlimTextMixin):
        return base
    if not issubclass(base, PreTrainedModel) or getattr(transformers, base.__name__, None) != base:
        raise TypeError(f"{base.__name__} is not a model class of transformers")
    return _slim_class(base)


@functools.cache
def _slim_class(base: Any) -> Any:
    # diffusers records this module name in model_index.json, and looks for its file by it.
    members = {
        "__module__": MODULE,
        "__doc__": f"{base.__name__} with the widths of its config's `slimdiff` entry.",
        "MADE": (_slim_class, base),
    }
    return type(f"Slim{base.__name__}", (SlimTextMixin, base), members)


def __getattr__(name: str) -> Any:
    """`SlimX` for any model class X that transformers exports."""
    base = getattr(transformers, name[4:], None) if name.startswith("Slim") else None
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return slim_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _keep_bytecode(code: types.CodeType) -> None:
    """Have Python load this file's bytecode from now on without looking at the file (PEP 552).

    diffusers copies the file over itself each time it loads it, without a lock: another process
    that reads it meanwhile finds it empty.

    Raises:
        ImportError: what ran was kept so, but the file was altered since.
    """
    path = Path(importlib.util.cache_from_source(__file__))
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little")
    kept, source = path.is_file() and path.read_bytes().startswith(header), _source()
    if kept and not _is_own(source) and source.endswith(LAST_LINE):  # no copy that is under way
        path.unlink(missing_ok=True)
        raise ImportError(f"{__file__}: was altered since it was first loaded; run this again")
    if not kept and _is_own(source):
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.parent.mkdir(exist_ok=True)
        new.write_bytes(header + importlib.util.source_hash(MODULE.encode()) + marshal.dumps(code))
        os.replace(new, path)


LAST_LINE = b"sys.modules.setdefault(MODULE, sys.modules[__name__])\n"

# The last lines, so that the file is whole when they run. diffusers runs it at every load, in the
# module of the run before if there is one: what was defined first stays, since models of it live.
if __name__.startswith("diffusers_modules.") and _STEM.startswith("slim_text_encoder_"):
    with contextlib.suppress(OSError):  # a cache that cannot be written
        _keep_bytecode(sys._getframe().f_code)
globals().update({name: own for name, own in _FIRST.items() if not name.startswith("__")})
sys.modules.setdefault(MODULE, sys.modules[__name__])
