"""Layers: the linears, convolutions and norms that groups name, found in a live denoiser."""

from __future__ import annotations

from torch import Tensor, nn

from slimdiff.errors import SlimdiffError
from slimdiff.groups import FACTORED, Group

FUSED_HINT = "call pipe.unfuse_qkv_projections() first"
ADAPTER_HINT = (
    "merge or remove adapters first (pipe.fuse_lora() then pipe.unload_lora_weights(), "
    "pipe.unload_ip_adapter())"
)

Layer = nn.Linear | nn.Conv2d | nn.GroupNorm


def layer_at(denoiser: nn.Module, path: str) -> Layer:
    """The linear, convolution or norm of a resolved group at `path`."""
    layer = denoiser.get_submodule(path)
    assert isinstance(layer, Layer), f"{path}: is a {type(layer).__name__}"
    return layer


def sides_of(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Outputs and inputs, all taps of a convolution counted; factored or not."""
    inward = getattr(layer, "projection", None)
    return len(layer.weight), (layer.weight if inward is None else inward)[0].numel()


def factors_of(layer: Layer, weight_or: Tensor, projection_ri: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of a linear or convolution in the shapes that it takes.

    Of a convolution the second is one of the same taps to the rank, the first one of a single tap.
    """
    if not isinstance(layer, nn.Conv2d):
        return weight_or, projection_ri
    taps = (layer.in_channels, *layer.kernel_size)
    return weight_or[..., None, None], projection_ri.unflatten(1, taps)


def weight_of(denoiser: nn.Module, group: Group, role: str) -> Tensor:
    """The weight of a role's layer, of a shared linear the group's columns; detached."""
    weight = layer_at(denoiser, group.paths[role]).weight.detach()
    return weight[:, group.input_columns(role)] if role in group.columns else weight


def factor_of(denoiser: nn.Module, group: Group) -> Tensor | None:
    """The second factor (r, i) or (r, i, ...) of a layer that was factored already; else None."""
    projection = getattr(denoiser.get_submodule(group.layer), "projection", None)
    return projection.detach() if group.kind in FACTORED and projection is not None else None


def is_fused(denoiser: nn.Module, group: Group) -> bool:
    """Whether the group's layer is the convolution of a fused upsampler."""
    upsampler = denoiser.get_submodule(group.upsampler) if group.upsampler else None
    return bool(getattr(upsampler, "fused", False))


def convolution_in(module: nn.Module, name: str, path: str) -> nn.Conv2d:
    """The plain 3 by 3 convolution at `name` inside the module at `path`.

    Raises:
        SlimdiffError: there is none.
    """
    conv = weighted_in(module, name, path, nn.Conv2d)
    assert isinstance(conv, nn.Conv2d)
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if shape != ((3, 3), (1, 1), (1, 1), (1, 1), 1):
        raise SlimdiffError(f"{path}.{name}: is {conv}, expected 3 by 3, stride 1, padding 1")
    return conv


def linear_in(module: nn.Module, name: str, path: str) -> nn.Linear:
    """The linear at `name` inside the module at `path`.

    Raises:
        SlimdiffError: there is none.
    """
    linear = weighted_in(module, name, path, nn.Linear)
    assert isinstance(linear, nn.Linear)
    return linear


def weighted_in(
    module: nn.Module, name: str, path: str, kind: type[nn.Linear] | type[nn.Conv2d]
) -> nn.Linear | nn.Conv2d:
    """The linear or convolution at `name` inside the module at `path`.

    Raises:
        SlimdiffError: there is none, or it is of another kind.
    """
    try:
        layer = module.get_submodule(name)
    except AttributeError as error:
        raise SlimdiffError(f"{path}: has no {name}; {FUSED_HINT}") from error
    if not isinstance(layer, kind) or not layer.weight.is_floating_point():
        raise SlimdiffError(
            f"{path}.{name}: is a {type(layer).__name__}, expected a torch.nn.{kind.__name__} with "
            f"floating-point weights; {ADAPTER_HINT}"
        )
    return layer
