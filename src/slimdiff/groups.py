"""Groups: the layers of a denoiser that must shrink together.

A model family is data (`Family`): patterns that name its transformer blocks and the layers inside
them. `resolve.resolve` checks that data against a live denoiser and returns its `Group`s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

Kind = Literal["query_key", "value_output", "feed_forward", "resnet"]

LAYERS: dict[str, str] = {
    "query_key": "attention",
    "value_output": "attention",
    "feed_forward": "feed_forward",
    "resnet": "resnet",
}
"""What a person calls the layer that a kind of group is part of."""

INWARD = {"q", "k", "v", "up", "conv1", "time", "norm"}
"""Roles whose layers put out the inner channels; those of the other roles take them in."""

OUTPUTS = {"value_output": "out", "feed_forward": "down", "resnet": "conv2"}
"""Kind of group -> the role that puts out what its layer puts out."""


@dataclass(frozen=True)
class Attention:
    """An attention layer of a block; the paths of its linears are relative to `path`."""

    path: str
    q: str = "to_q"
    k: str = "to_k"
    v: str = "to_v"
    out: str = "to_out.0"


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer of a block; whether it is gated is read off the weights."""

    path: str
    up: str = "net.0.proj"
    down: str = "net.2"


@dataclass(frozen=True)
class ResNet:
    """A block that is itself a ResNet: conv1 -> (+ time) -> norm -> conv2 on its inner channels."""

    conv1: str = "conv1"
    time: str = "time_emb_proj"
    norm: str = "norm2"
    conv2: str = "conv2"


@dataclass(frozen=True)
class Block:
    """The blocks whose module path matches `pattern` in full, and the layers inside each."""

    pattern: str
    layers: tuple[Attention | FeedForward | ResNet, ...]


Shapes = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model family: the denoiser class, named by string, its blocks and its inputs.

    `inputs` maps the denoiser's config to the shapes of one forward's tensor arguments (batch 1);
    a nested dict stands for a nested argument.
    """

    denoiser: str
    blocks: tuple[Block, ...]
    inputs: Callable[[Mapping[str, Any]], Shapes]


@dataclass(frozen=True)
class Group:
    """Layers that shrink together.

    Attributes:
        name: path of the layer, with `.qk` or `.vo` for the two halves of an attention layer.
        kind: `query_key`, `value_output`, `feed_forward` or `resnet`.
        layer: module path of the attention or feed-forward layer, or of the ResNet.
        block: module path of the transformer block, or of the ResNet.
        paths: role -> module path of the linear, convolution or norm.
        heads: attention heads (1 for the others).
        width: dense width: channels per head, hidden units, or a ResNet's inner channels.
        gated: `up` (feed-forward) or `time` (ResNet) has 2 * width rows.
        step: widths are multiples of this: the channels of a norm group (ResNet only).
    """

    name: str
    kind: Kind
    layer: str
    block: str
    paths: Mapping[str, str] = field(hash=False)
    heads: int
    width: int
    gated: bool = False
    step: int = 1


Layer = nn.Linear | nn.Conv2d | nn.GroupNorm


def layer_at(denoiser: nn.Module, path: str) -> Layer:
    """The linear, convolution or norm of a resolved group at `path`."""
    layer = denoiser.get_submodule(path)
    assert isinstance(layer, Layer), f"{path}: is a {type(layer).__name__}"
    return layer
