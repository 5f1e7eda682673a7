"""Denoisers with narrow layers. Saved beside the weights, this file lets diffusers load them:

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

It needs torch and diffusers alone. For any model class X of diffusers, `SlimX` is X with the widths
that config.json holds under "slimdiff":

    {"version": 1,
     "linears": {"<path of a linear>": [in_features, out_features]},
     "convolutions": {"<path of a convolution>": [in_channels per group, out_channels]},
     "norms": {"<path of a GroupNorm>": [num_groups, num_channels]},
     "factored": {"<path of a linear or convolution>": rank},
     "fused_upsamplers": {"<path of an Upsample2D>": 2},
     "attentions": {"<path of an attention layer>": {"heads": 8, "qk": 24, "vo": 24}},
     "constants": {"<path of a layer that was removed>": channels},
     "refit": {"layers": 40},
     "healed": {"steps": 500}}

qk and vo are channels per head of queries and keys, and of values. A layer that was removed puts
out a constant. A fused upsampler convolves before it doubles. `refit` and `healed` say that weights
were solved anew, or trained, afterwards, so that the maps no longer give them. `convolutions`,
`norms`, `factored`, `fused_upsamplers`, `constants`, `refit` and `healed` may be left out.

Saved, it is named by a hash of its content (`MODULE`): two releases live side by side in a process,
and one release defines its classes once, however often it is loaded. Slim models can be pickled;
another process finds their classes where slimdiff is installed or, of a model that diffusers loaded
with this file, where diffusers' cache of modules is on `sys.path`: in workers that are spawned, or
after `diffusers.utils.dynamic_modules_utils.init_hf_modules()`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import json
import marshal
import math
import os
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

VERSION = 1
PLAN_FILE = "slimdiff.json"
MAPS_FILE = "slimdiff_maps.safetensors"
MANIFEST_FILE = "slimdiff_manifest.json"

STOCK_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
)
"""Processors that compute what `SlimAttnProcessor` computes, for equal widths."""

REFUSAL = {
    "quant_method": "none: slimdiff made the layers narrow, which this class does not know. Load "
    "this very folder (no subfolder) with diffusers.AutoModel.from_pretrained(folder, "
    "trust_remote_code=True) or slimdiff.load(folder), its pipeline with "
    "DiffusionPipeline.from_pretrained(pipeline, trust_remote_code=True) or "
    "slimdiff.load_pipeline(pipeline)",
    "slimdiff": VERSION,
}
"""The quantization that a saved config tells of, for other classes than the slim one.

The dense class would ignore an entry that it does not know, and make random layers where weights
are missing. Of an unknown quantization it says the name, which is a sentence here, and loads
nothing.
"""

DOUBLED_AT_ONCE = 2**25
"""Products of a fused upsampler that are in memory at once, unless one image has more."""

_NOTHING = Tensor()


def _digest(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()[:6]


_STEM = __name__.rpartition(".")[2]
MODULE = (
    f"slim_denoiser_{_digest(Path(__file__).read_bytes())}" if _STEM == "slim_denoiser" else _STEM
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
    same dtype and device. Attention layers learn their heads, widths and scale; where qk and vo
    differ, `SlimAttnProcessor` is installed. Layers that were removed become constants.

    Raises:
        SlimConfigError: a layer is missing, or its widths contradict each other, or differing qk
            and vo are asked of an attention layer with a processor of its own, or a layer is none
            that can be a constant.
    """
    check_slim(slim, type(model).__name__)
    for path, (inputs, outputs) in slim["linears"].items():
        _resize(_layer(model, path, nn.Linear), inputs, outputs)
    for path, (inputs, outputs) in slim.get("convolutions", {}).items():
        _resize_convolution(_layer(model, path, nn.Conv2d), inputs, outputs)
    for path, (groups, channels) in slim.get("norms", {}).items():
        _resize_norm(_layer(model, path, nn.GroupNorm), groups, channels)
    for path, rank in slim.get("factored", {}).items():
        _factor(_layer(model, path, (nn.Linear, nn.Conv2d)), rank)
    for path in slim.get("fused_upsamplers", {}):
        _fuse(path, _layer(model, path, Upsample2D))
    for path, sizes in slim["attentions"].items():
        _set_widths(path, _layer(model, path, nn.Module), **sizes)
    for path, channels in slim.get("constants", {}).items():
        layer = _layer(model, path, (*CONSTANTS, *CONSTANTS.values()))
        if getattr(layer, "constant", _NOTHING).shape != (channels,):
            become_constant_(layer, next(layer.parameters()).new_zeros(channels), path)
    return model


def become_slim_(model: nn.Module, slim: dict[str, Any]) -> nn.Module:
    """Turn a live model, whose linears are narrow already, into its slim class, in place.

    One that is slim takes on another slim config. No weight is touched. Afterwards
    `model.config["slimdiff"]` is `slim`, and `save_pretrained` writes a folder that plain diffusers
    loads. A pipeline that holds the model has noted its
    former class: assign the model again (`pipe.unet = pipe.unet`) before `pipe.save_pretrained`.

    Raises:
        SlimConfigError: as for `reshape_`; or a linear does not have the shape that `slim` says.
    """
    slim = json.loads(json.dumps(slim))
    check_slim(slim, type(model).__name__)
    for path, (inputs, outputs) in (slim["linears"] | slim.get("convolutions", {})).items():
        shape = tuple(_layer(model, path, (nn.Linear, nn.Conv2d)).weight.shape[:2])
        if shape != (outputs, inputs):
            raise SlimConfigError(
                f"{path}: weight is {shape}, expected {(outputs, inputs)}; put the narrow weights "
                f"in first, or call reshape_ before copying them"
            )
    reshape_(model, slim)
    model.__class__ = slim_class(type(model))
    model.register_to_config(slimdiff=slim, _class_name=type(model).__name__)  # type: ignore[operator]  # of ConfigMixin
    return model


def _layer(model: nn.Module, path: str, kind: type | tuple[type, ...]) -> Any:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise SlimConfigError(
            f"{path}: {type(model).__name__} has no such {names}; the slim config belongs "
            f"to another model"
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


class FactoredLinear(nn.Linear):
    """A linear of low rank: weight (out_features, rank) times projection (rank, in_features)."""

    projection: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Project (..., in_features) to the rank, and from there to (..., out_features)."""
        return F.linear(F.linear(input, self.projection), self.weight, self.bias)


class FactoredConv2d(nn.Conv2d):
    """A convolution of low rank: `projection` (rank, in, height, width) holds its taps, stride and
    padding, `weight` (out, rank, 1, 1) goes from the rank to the outputs."""

    projection: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (n, in, height, width) to the rank, and from there to (n, out, ...)."""
        narrow = F.conv2d(input, self.projection, None, self.stride, self.padding, self.dilation)
        return F.conv2d(narrow, self.weight, self.bias)


def _factor(layer: Any, rank: int) -> None:
    dense, projection = layer.weight, getattr(layer, "projection", None)
    layer.__class__ = FactoredConv2d if isinstance(layer, nn.Conv2d) else FactoredLinear
    taps = (dense if projection is None else projection).shape[1:]
    if projection is not None and dense.shape[1] == rank:
        return
    layer.weight = _empty_like(dense, (dense.shape[0], rank, *[1] * (len(taps) - 1)))
    layer.register_parameter("projection", _empty_like(dense, (rank, *taps)))
    nn.init.normal_(layer.weight, std=rank**-0.5)  # the bias stays: others may share it
    nn.init.normal_(layer.projection, std=math.prod(taps) ** -0.5)


def may_be_fused(upsampler: nn.Module) -> bool:
    """Whether a module doubles by nearest neighbours and then convolves 3 by 3, padded by zeros."""
    conv = getattr(upsampler, "conv", None)
    if not isinstance(upsampler, Upsample2D) or not isinstance(conv, nn.Conv2d):
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return (
        shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and (conv.padding_mode, upsampler.norm) == ("zeros", None)
        and (upsampler.use_conv, upsampler.interpolate) == (True, True)
        and (upsampler.use_conv_transpose, upsampler.name) == (False, "conv")
    )


def _fuse(path: str, upsampler: Any) -> None:
    if not may_be_fused(upsampler):
        raise SlimConfigError(
            f"{path}: is no nearest-neighbour upsampler with a 3 by 3 convolution; the slim config "
            f"belongs to another model"
        )
    upsampler.__class__ = FusedUpsample2D
    kind = type(upsampler.conv)
    upsampler.conv.__class__ = DOUBLING.get(kind, kind)


class FusedUpsample2D(Upsample2D):
    """Doubling and convolution in one, with a quarter of the multiplications.

    Its `conv` stays what it is to all others, a convolution of the doubled map. Where it is
    something else, as with an adapter around it, or another size is asked for, the map is doubled
    first.
    """

    fused = True

    def forward(
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """From (n, c, height, width) to (n, c', 2 height, 2 width), or to `output_size`."""
        doubled = tuple(2 * side for side in hidden_states.shape[2:])
        other = output_size is not None and tuple(output_size) != doubled
        if other or not getattr(type(self.conv), "doubles", False):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return self.conv(hidden_states, double=True)


class DoublingConv2d(nn.Conv2d):
    """A 3 by 3 convolution that can double its input first, by nearest neighbours."""

    doubles = True

    def forward(self, input: Tensor, double: bool = False) -> Tensor:
        """Convolve (n, in, height, width), doubled if so told."""
        return _double(input, self.weight, self.bias) if double else super().forward(input)


class FactoredDoublingConv2d(FactoredConv2d):
    """The same, of low rank."""

    doubles = True

    def forward(self, input: Tensor, double: bool = False) -> Tensor:
        """Convolve (n, in, height, width), doubled if so told."""
        if not double:
            return super().forward(input)
        return F.conv2d(_double(input, self.projection, None), self.weight, self.bias)


DOUBLING: dict[type, type] = {
    nn.Conv2d: DoublingConv2d,
    FactoredConv2d: FactoredDoublingConv2d,
}
"""Convolutions that a fused upsampler may have, and what they become."""


def _double(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d(interpolate(input, scale_factor=2), weight, bias, padding=1)`, nearest, 3 by 3.

    Doubling repeats pixels, so each of the nine taps is multiplied once for a pixel of the input,
    not for its four copies; the products are added where their copies would have met.
    """
    outputs, inputs = weight.shape[:2]
    # Made anew in each call: kept, it would go stale when an adapter is fused into the weight.
    kernel = weight.permute(2, 3, 0, 1).reshape(9 * outputs, inputs, 1, 1)
    if bias is not None:  # every output pixel has the middle tap once
        bias = F.pad(bias, (4 * outputs, 4 * outputs))
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph is for any batch
        return _double_rows(input, kernel, bias)
    rows = max(1, DOUBLED_AT_ONCE // (9 * outputs * input[0, 0].numel()))
    results = [_double_rows(own, kernel, bias) for own in input.split(rows)]
    return results[0] if len(results) == 1 else torch.cat(results)


def _double_rows(rows: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """`_double` for some rows (n, in, height, width), by taps (9 * out, in, 1, 1)."""
    height, width = rows.shape[2:]
    taps = F.conv2d(rows, kernel, bias).unflatten(1, (3, 3, -1))
    size = (rows.shape[0], taps.shape[3], 2 * height, 2 * width)
    layout = torch.channels_last if _is_channels_last(rows) else torch.contiguous_format
    result = torch.empty(size, dtype=taps.dtype, device=taps.device, memory_format=layout)
    copies = result.unflatten(3, (width, 2)).unflatten(2, (height, 2))
    for down, own in enumerate(_met(taps[:, 0], taps[:, 1], taps[:, 2], -2)):
        for right, pixels in enumerate(_met(own[:, 0], own[:, 1], own[:, 2], -1)):
            copies[:, :, :, down, :, right] = pixels
    return result


def _met(before: Tensor, at: Tensor, after: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What reaches the first and the second copy of a pixel along `dim`, of three taps."""
    rest = at.shape[dim] - 1
    first, second = at + after, before + at
    first.narrow(dim, 1, rest).add_(before.narrow(dim, 0, rest))
    second.narrow(dim, 0, rest).add_(after.narrow(dim, 1, rest))
    return first, second


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _resize_convolution(conv: nn.Conv2d, inputs: int, outputs: int) -> None:
    if conv.weight.shape[:2] == (outputs, inputs):
        return
    conv.groups = 1 if conv.groups == 1 else outputs  # the others are depthwise
    conv.in_channels, conv.out_channels = inputs * conv.groups, outputs
    conv.weight = _empty_like(conv.weight, (outputs, inputs, *conv.kernel_size))
    if conv.bias is not None:
        conv.bias = _empty_like(conv.bias, (outputs,))
    conv.reset_parameters()


def _resize_norm(norm: nn.GroupNorm, groups: int, channels: int) -> None:
    norm.num_groups = groups
    if norm.num_channels == channels:
        return
    norm.num_channels = channels
    norm.weight, norm.bias = (_empty_like(p, (channels,)) for p in (norm.weight, norm.bias))
    norm.reset_parameters()


def _empty_like(parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)


def _set_widths(path: str, attn: Any, heads: int, qk: int, vo: int) -> None:
    for name, width in (("to_q", qk), ("to_k", qk), ("to_v", vo)):
        found = getattr(attn, name).out_features if hasattr(attn, name) else heads * width
        if found != heads * width:
            raise SlimConfigError(
                f"{path}.{name}: has {found} outputs, expected {heads} heads of {width}; the slim "
                f"config contradicts itself or belongs to another model"
            )
    derived = {
        "heads": heads,
        "sliceable_head_dim": heads,
        "inner_dim": heads * qk,
        "inner_kv_dim": heads * vo,
        "scale": qk**-0.5,
    }
    for name, value in derived.items():
        if hasattr(attn, name):
            setattr(attn, name, value)
    if qk != vo:
        _untie(path, attn, qk, vo)
    elif isinstance(attn, PaddedAttention):
        attn.qk_width, attn.vo_width = qk, vo
    elif type(attn) is UntiedAttention:
        attn.__class__ = Attention
        attn.set_processor(AttnProcessor2_0())


def _untie(path: str, attn: Any, qk: int, vo: int) -> None:
    processor = type(attn.processor).__name__
    if type(attn) is Attention and processor in (*STOCK_PROCESSORS, SlimAttnProcessor.__name__):
        attn.__class__ = UntiedAttention
        attn.set_processor(SlimAttnProcessor())
    if type(attn) is UntiedAttention:
        attn.qk_width, attn.vo_width = qk, vo
        return
    if getattr(attn, "fused_projections", False) or not hasattr(attn, "set_processor"):
        raise SlimConfigError(
            f"{path}: {type(attn).__name__} with {processor} cannot have values of another width "
            f"than its queries and keys; keep the widths tied, or reset the processor with "
            f"set_default_attn_processor()"
        )
    attn.qk_width, attn.vo_width = qk, vo
    if not isinstance(attn, PaddedAttention):
        attn.__class__ = _padded_class(attn.__class__)
        attn.set_processor(attn.processor)


def may_be_constant(layer: nn.Module) -> bool:
    """Whether a layer can be removed, that is, put out a constant.

    It must not change the size of a feature map, nor put out anything but one tensor.
    """
    if type(layer) is ResnetBlock2D:
        return not (layer.up or layer.down)
    if type(layer) is Attention:
        norms = [getattr(layer, name, None) for name in ("norm_q", "norm_k")]
        return norms == [None, None] and type(layer.processor).__name__ in STOCK_PROCESSORS
    return type(layer) is FeedForward


def become_constant_(layer: nn.Module, constant: Tensor, path: str = "layer") -> None:
    """Remove a layer in place: it puts out `constant` (o,) and forgets its weights.

    Raises:
        SlimConfigError: it is none that can be a constant; `path` stands for it in the message.
    """
    if not may_be_constant(layer):
        raise SlimConfigError(
            f"{path}: {type(layer).__name__} cannot be removed; expected a plain feed-forward, "
            f"attention layer or ResNet of diffusers, start from the dense model"
        )
    weight = next(layer.parameters())
    value = constant.to(device=weight.device, dtype=weight.dtype).clone()
    layer.__class__ = CONSTANTS[type(layer)]
    for name in layer.REMOVED:  # type: ignore[union-attr]  # the classes in `CONSTANTS` have it
        setattr(layer, name, None)
    layer.constant = nn.Parameter(value, requires_grad=weight.requires_grad)
    if isinstance(layer, ConstantAttention):
        layer.was_self_attention = not layer.is_cross_attention
        # Guidance that perturbs or skips self-attention takes the layers where this is False: it is
        # to say that it finds none here, not to have no effect.
        layer.is_cross_attention = True


class ConstantAttention(Attention):
    """Attention that was removed: `constant` for every token. Its processor is never called."""

    was_self_attention: bool
    REMOVED = ("to_q", "to_k", "to_v", "to_out")

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """The constant in the shape of `hidden_states` (n, tokens, c) or (n, c, height, width)."""
        output = _spread(self.constant, hidden_states)
        if self.residual_connection:
            output = output + hidden_states
        return output / self.rescale_output_factor if self.rescale_output_factor != 1 else output

    def fuse_projections(self, fuse: bool = True) -> None:
        """There are none."""


class ConstantFeedForward(FeedForward):
    """Feed-forward that was removed: `constant` for every token."""

    REMOVED = ("net",)

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """The constant in the shape of `hidden_states` (n, tokens, c)."""
        return _spread(self.constant, hidden_states)


class ConstantResnet(ResnetBlock2D):
    """ResNet whose inner path was removed: `constant` for every pixel, on top of the shortcut."""

    REMOVED = ("conv1", "time_emb_proj", "norm2", "conv2")

    def forward(self, input_tensor: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Shortcut of `input_tensor` (n, c, height, width) plus the constant, rescaled."""
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (shortcut + _spread(self.constant, shortcut)) / self.output_scale_factor


CONSTANTS: dict[type, type] = {
    Attention: ConstantAttention,
    FeedForward: ConstantFeedForward,
    ResnetBlock2D: ConstantResnet,
}
"""Layers that can be removed, and what they become."""


def _spread(constant: Tensor, like: Tensor) -> Tensor:
    """`constant` (o,) for every token of `like` (n, tokens, c), or pixel of (n, c, h, w)."""
    constant = constant.to(like.dtype)
    if like.ndim == 4:
        return constant[:, None, None].expand(like.shape[0], -1, *like.shape[2:])
    return constant.expand(*like.shape[:-1], -1)


class RunTimeClass:
    """Of classes that are made at run time: a pickle says what makes them, as no module has them.

    `MADE` is a function of this file and the class that it was given.
    """

    MADE: tuple[Any, type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any object, but for what gives its class."""
        reduced = super().__reduce_ex__(protocol)
        made = vars(type(self)).get("MADE")  # what others derive from it is theirs to import
        return reduced if made is None else (_blank, made, *reduced[2:])


def _blank(make: Any, base: type) -> Any:
    kind = make(base)
    return kind.__new__(kind)


class UntiedAttention(Attention):
    """Attention whose values have another width than its queries and keys.

    The stock processors would take the channels of one value for those of several tokens, so
    `SlimAttnProcessor` stays when one of them is chosen (sliced attention, xFormers). Those of
    perturbed attention guidance see padded projections, as in `PaddedAttention`.
    """

    qk_width: int
    vo_width: int

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch; a processor becomes one that fits.

        Raises:
            ValueError: it is a processor that none here stands in for.
        """
        super().__setattr__(name, _for_untied(value) if name == "processor" else value)


def _for_untied(processor: Any) -> Any:
    name = type(processor).__name__
    if name == SlimAttnProcessor.__name__ or hasattr(type(processor), "pads"):
        return processor
    if name in STOCK_PROCESSORS:
        return SlimAttnProcessor()
    if name.startswith("PAG"):
        return _padding(processor)
    raise ValueError(
        f"{name} needs equal query-key and value widths, but this attention layer was "
        f"slimmed untied; compress with tied widths to use it"
    )


class PaddedAttention(RunTimeClass):
    """Attention whose processor is led to believe that all widths are equal.

    Processors of transformers (joint attention, rotary positions, normalised queries) take one
    width for granted. They see this layer through `_Padded`: projections are padded with zero
    channels, which change no product, and what goes to the output loses them again.
    """

    qk_width: int
    vo_width: int

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch; a processor becomes one that sees padded projections."""
        super().__setattr__(name, _padding(value) if name == "processor" else value)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; a layer without an output projection returns narrow values."""
        output = super().forward(*args, **kwargs)  # type: ignore[misc]  # a mixin
        return output if hasattr(self, "to_out") else _Padded(self).narrow(output)

    def fuse_projections(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a fused projection would be cut into three equal parts.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "this attention layer has values of another width than its queries and keys, so its "
            "projections cannot be fused; leave fuse_qkv_projections() out"
        )


class _Padded:
    """An attention layer as its processor sees it: all widths equal."""

    def __init__(self, attn: Any) -> None:
        self.attn = attn
        self.width = max(attn.qk_width, attn.vo_width)

    def __getattr__(self, name: str) -> Any:
        """The layer's own, but for projections."""
        value = getattr(self.attn, name)
        if value is None or name not in _PROJECTIONS:
            return value
        kind = _PROJECTIONS[name]
        if kind == "out":
            if isinstance(value, nn.ModuleList):
                return [lambda x: value[0](self.narrow(x)), *value[1:]]
            return lambda x: value(self.narrow(x))
        if kind == "v":
            return lambda x: self.wide(value(x), self.attn.vo_width)
        if kind == "q":  # the processor divides by the root of the padded width
            scale = (self.width / self.attn.qk_width) ** 0.5
            return lambda x: self.wide(value(x), self.attn.qk_width) * scale
        return lambda x: self.wide(value(x), self.attn.qk_width)

    def wide(self, x_bti: Tensor, width: int) -> Tensor:
        """Zero channels after those of each head, up to the common width."""
        if width == self.width:
            return x_bti
        heads = x_bti.unflatten(-1, (self.attn.heads, width))
        return F.pad(heads, (0, self.width - width)).flatten(-2)

    def narrow(self, x_bti: Tensor) -> Tensor:
        """Without what `wide` added to the values."""
        return x_bti.unflatten(-1, (self.attn.heads, -1))[..., : self.attn.vo_width].flatten(-2)


_PROJECTIONS = {
    "to_q": "q",
    "add_q_proj": "q",
    "to_k": "k",
    "add_k_proj": "k",
    "to_v": "v",
    "add_v_proj": "v",
    "to_out": "out",
    "to_add_out": "out",
}


def _padding(processor: Any) -> Any:
    """The processor, for layers that it sees through `_Padded`."""
    if hasattr(type(processor), "pads"):
        return processor
    padding, stock = copy.copy(processor), processor.__class__
    padding.__class__ = _padding_class(stock)
    return padding


@functools.cache
def _padding_class(stock: Any) -> type:
    @functools.wraps(stock.__call__)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return stock.__call__(self, _Padded(attn), *args, **kwargs)

    members = {"__module__": MODULE, "MADE": (_padding_class, stock), "__call__": call}
    return type(f"Padding{stock.__name__}", (RunTimeClass, stock), members | {"pads": True})


@functools.cache
def _padded_class(base: Any) -> type:
    members = {"__module__": MODULE, "MADE": (_padded_class, base)}
    return type(f"Padded{base.__name__}", (PaddedAttention, base), members)


class SlimAttnProcessor:
    """Scaled dot product attention with a value width of its own, scaled by `attn.scale`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from `hidden_states` (n, tokens, channels) or (n, channels, height, width).

        Raises:
            ValueError: keys and values have different numbers of tokens.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        normed = hidden_states
        if attn.group_norm is not None:
            normed = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = normed
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross is not None:
                context = attn.norm_encoder_hidden_states(context)
        output = _attend(attn, normed, context, attention_mask)
        output = attn.to_out[1](attn.to_out[0](output))
        if image_shape is not None:
            output = output.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor


def _attend(attn: Any, states: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (
        linear(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for linear, tokens in ((attn.to_q, states), (attn.to_k, context), (attn.to_v, context))
    )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"{key.shape[-2]} keys but {value.shape[-2]} values; expected as many")
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, context.shape[1], context.shape[0])
        mask = mask.unflatten(0, (context.shape[0], attn.heads))
    # Fused kernels want one width, a multiple of 8: zero channels change neither product.
    width = -(-max(key.shape[-1], value.shape[-1]) // 8) * 8
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale)
    return output[..., : value.shape[-1]].transpose(1, 2).flatten(2).to(query.dtype)


class SlimMixin(RunTimeClass):
    """What slim classes add to diffusers: a checked config, files beside the weights, and blocks of
    unlike widths that are compiled, and shared among ranks, by their widths."""

    _auto_class = "AutoModel"
    _repeated_blocks: list[str]

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, checked.

        Raises:
            SlimConfigError: no slim config, or one of another version; names the folder.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]  # a mixin
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        _forget_how_to_load(config)
        check_slim(config.get("slimdiff"), str(pretrained_model_name_or_path))
        return loaded

    @classmethod
    def from_config(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers."""
        if isinstance(config, dict):
            config = dict(config)
            _forget_how_to_load(config)
        return super().from_config(config, *args, **kwargs)  # type: ignore[misc]  # a mixin

    def to_json_string(self: Any) -> str:
        """As in diffusers; the config that is saved makes the dense class refuse to read it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]  # a mixin
        config.setdefault("quantization_config", REFUSAL)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def compile_repeated_blocks(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; blocks of unlike widths are compiled apart.

        Dynamo counts recompilations of a function, and gives it up beyond 8. Each kind of blocks
        runs through a function of its own, so that no width uses up what others may need.
        """
        kinds: dict[Any, list[nn.Module]] = {}
        for block in self.modules():
            if type(block).__name__ in self._repeated_blocks:
                kinds.setdefault(_kind_of(block), []).append(block)
        if not kinds:
            super().compile_repeated_blocks(*args, **kwargs)  # type: ignore[misc]  # says what is missing
        for number, blocks in enumerate(kinds.values()):
            compiled = torch.compile(_caller(number), *args, **kwargs)
            for block in blocks:
                block._compiled_call_impl = types.MethodType(compiled, block)  # as `block.compile`

    def enable_parallelism(self: Any, *, config: Any, **kwargs: Any) -> None:
        """As in diffusers, where the heads of every layer can be shared among the ranks.

        Raises:
            ValueError: they cannot; names a layer.
        """
        _refuse_uneven_heads(self.config["slimdiff"] or {"attentions": {}}, config)
        super().enable_parallelism(config=config, **kwargs)  # type: ignore[misc]  # a mixin

    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in diffusers; adds this file, the plan, the maps and the manifest."""
        hub = ("repo_id", "commit_message", "private", "token", "create_pr")
        upload = {name: kwargs.pop(name) for name in hub if name in kwargs}
        push = kwargs.pop("push_to_hub", False)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]  # a mixin
        if not is_main_process:
            return
        folder = Path(save_directory)
        write_module(folder)
        _save_record(self, folder)
        write_manifest(folder)
        if push:
            kept = ("safe_serialization", "variant")
            upload |= {name: kwargs[name] for name in kept if name in kwargs}
            self.push_to_hub(**{"repo_id": folder.name, **upload})


def _set_attn_processor(base: Any) -> Any:
    """`base.set_attn_processor`, which refuses adapters that were made for the dense layers.

    Raises:
        ValueError: one brings projections that do not fit; names a layer.
    """

    @functools.wraps(base.set_attn_processor)
    def set_attn_processor(self: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(processor, dict):
            for name, one in processor.items():
                _refuse_dense_adapter(
                    self.config["slimdiff"] or {}, name.removesuffix(".processor"), one
                )
        base.set_attn_processor(self, processor, *args, **kwargs)

    return set_attn_processor


def _refuse_dense_adapter(slim: dict[str, Any], path: str, processor: Any) -> None:
    """IP-Adapters and Custom Diffusion bring keys and values as wide as those of the dense layer.

    Those of FLUX put out what they found beside the layer's own values. Adapters of UNets go by the
    order of the cross-attention layers, so none may be missing.
    """
    name, width = type(processor).__name__, getattr(processor, "hidden_size", None)
    sizes = slim.get("attentions", {}).get(path)
    if width is None:
        return
    parts = ("qk",) if name.startswith("FluxIPAdapter") else ("qk", "vo")
    narrow = sizes is not None and any(sizes["heads"] * sizes[part] != width for part in parts)
    removed = [layer for layer in slim.get("constants", {}) if layer.endswith(".attn2")]
    if narrow or (removed and name.startswith("IPAdapter")):
        what = f"{path}: was slimmed to other widths" if narrow else f"{removed[0]}: was removed"
        raise ValueError(
            f"{what}, and {name} was made for the dense layers, {width} wide; use it with the "
            f"dense model, or compress the layers other than attention alone"
        )


def _forget_how_to_load(config: dict[str, Any]) -> None:
    """Drop, in place, what tells others how a folder is loaded."""
    config.pop("auto_map", None)
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and "slimdiff" in quantization:
        del config["quantization_config"]


def _kind_of(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that compile to the same graph: layers, shapes and settings."""
    kind: list[Any] = [type(block)]
    for path, layer in block.named_modules():
        known = {k: v for k, v in vars(layer).items() if isinstance(v, (int, float, str))}
        kind += [path, type(layer), type(getattr(layer, "processor", None)), *known.items()]
    kind += [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()]
    return tuple(kind)


def _caller(number: int) -> Any:
    """A function that calls a block. Each has code of its own, which is what dynamo counts by."""

    def call(block: Any, *args: Any, **kwargs: Any) -> Any:
        return block._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"call_{number}")
    return call


def _refuse_uneven_heads(slim: dict[str, Any], config: Any) -> None:
    """Raise where ranks cannot have equally many heads of a layer, as their exchange takes."""
    context = getattr(config, "context_parallel_config", config)
    tensor = getattr(config, "tensor_parallel_config", config)
    even = not getattr(context, "ulysses_anything", False)
    ranks = int((even and getattr(context, "ulysses_degree", None)) or 1)
    ranks = max(ranks, int(getattr(tensor, "tp_degree", None) or 1))
    for path, sizes in slim["attentions"].items():
        if sizes["heads"] % ranks:
            raise ValueError(
                f"{path}: has {sizes['heads']} heads, which {ranks} ranks cannot share equally; "
                f"compress with head_multiple={ranks}, or use as many ranks as divide them"
            )


def write_module(folder: Path) -> None:
    """Write this file into a slim folder, in the place of another release's."""
    for path in folder.glob("slim_denoiser*.py"):
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
    return MODULE == f"slim_denoiser_{_digest(source)}"


def _save_record(model: Any, folder: Path) -> None:
    """Write the plan and the maps; a model that carries none keeps those it was loaded with."""
    record = getattr(model, "slim_record", None)
    if record is not None:
        from safetensors.torch import save_file

        (folder / PLAN_FILE).write_text(record.plan.to_json(), encoding="utf-8")
        maps = {name: compact(value) for name, value in record.maps.items()}
        save_file(maps, str(folder / MAPS_FILE), metadata={"format": "pt"})
        return
    source = Path(str(model.config.get("_name_or_path") or ""))
    for name in (PLAN_FILE, MAPS_FILE):
        if not (source / name).is_file() or not _same_slim(source, model):
            (folder / name).unlink(missing_ok=True)
        elif source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


def _same_slim(source: Path, model: Any) -> bool:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("slimdiff") == model.config["slimdiff"])


def compact(value: Tensor) -> Tensor:
    """Float16 where that is accurate to 1e-3, else float32; integers stay as they are."""
    value = value.detach().cpu()
    if not value.is_floating_point():
        return value.contiguous().clone()
    half, wide = value.half(), value.double()
    accurate = bool((half.double() - wide).norm() <= 1e-3 * wide.norm())
    return (half if accurate else value.float()).contiguous().clone()


def write_manifest(folder: Path) -> None:
    """List sizes and SHA-256 sums of the weights, the maps, the plan, the config and this file."""
    fixed = {PLAN_FILE, "config.json", f"{MODULE}.py"}
    names = sorted({p.name for p in folder.glob("*.safetensors")} | fixed)
    files = {name: fingerprint(folder / name) for name in names if (folder / name).is_file()}
    text = json.dumps({"version": VERSION, "files": files}, indent=1) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 sum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


REPEATED_BLOCKS = {
    "CogVideoXTransformer3DModel": ["CogVideoXBlock"],
    "ControlNetModel": ["BasicTransformerBlock"],
    "DiTTransformer2DModel": ["BasicTransformerBlock"],
    "HunyuanDiT2DModel": ["HunyuanDiTBlock"],
    "PixArtTransformer2DModel": ["BasicTransformerBlock"],
    "SanaTransformer2DModel": ["SanaTransformerBlock"],
    "SD3Transformer2DModel": ["JointTransformerBlock"],
}
"""Blocks that are compiled one by one, of classes for which diffusers names none."""


def slim_class(base: Any) -> type:
    """The slim subclass of a diffusers model class, always the same one; a slim class is its own.

    Raises:
        TypeError: not a diffusers model class.
    """
    if issubclass(base, SlimMixin) or base.__module__ == MODULE:
        return base
    if not issubclass(base, ModelMixin):
        raise TypeError(f"{base.__name__} is not a diffusers model class")
    return _slim_class(base)


@functools.cache
def _slim_class(base: Any) -> type:
    # diffusers records this module name in model_index.json, and looks for its file by it.
    members = {
        "__module__": MODULE,
        "__doc__": f"{base.__name__} with the widths of its config's `slimdiff` entry.",
        "__init__": _init_of(base),
        "MADE": (_slim_class, base),
        "_repeated_blocks": getattr(base, "_repeated_blocks", None)
        or REPEATED_BLOCKS.get(base.__name__, []),
    }
    if hasattr(base, "set_attn_processor"):
        members["set_attn_processor"] = _set_attn_processor(base)
    return type(f"Slim{base.__name__}", (SlimMixin, base), members)


def _init_of(base: Any) -> Any:
    """`base.__init__` with one more argument; diffusers reads config keys off its signature."""

    def __init__(
        self: Any, *args: Any, slimdiff: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        base.__init__(self, *args, **kwargs)
        self.register_to_config(slimdiff=slimdiff)
        if slimdiff is not None:
            reshape_(self, slimdiff)

    signature = inspect.signature(base.__init__)
    own = inspect.Parameter("slimdiff", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    rest = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - rest, own)
    __init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # of functions
    return __init__


def __getattr__(name: str) -> Any:
    """`SlimX` for any model class X that diffusers exports."""
    base = getattr(diffusers, name[4:], None) if name.startswith("Slim") else None
    if isinstance(base, type) and issubclass(base, ModelMixin):
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
if __name__.startswith("diffusers_modules.") and _STEM.startswith("slim_denoiser_"):
    with contextlib.suppress(OSError):  # a cache that cannot be written
        _keep_bytecode(sys._getframe().f_code)
globals().update({name: own for name, own in _FIRST.items() if not name.startswith("__")})
sys.modules.setdefault(MODULE, sys.modules[__name__])
