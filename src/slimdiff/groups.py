"""Groups: the layers of a denoiser that must shrink together.

A model family is data (`Family`): patterns that name its transformer blocks and the layers inside
them. `resolve.resolve` checks that data against a live denoiser and returns its `Group`s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["query_key", "value_output", "feed_forward", "resnet", "modulation", "projection"]

LAYERS: dict[str, str] = {
    "query_key": "attention",
    "value_output": "attention",
    "feed_forward": "feed_forward",
    "resnet": "resnet",
    "modulation": "modulation",
    "projection": "projection",
}
"""What a person calls the layer that a kind of group is part of."""

FACTORED = ("modulation", "projection")
"""Kinds of group that are one linear or convolution, which becomes two of a rank between them."""

ADDED = "_added"
"""Ends the roles of a joint attention layer's second stream: `q_added`, `out_added`, ..."""

_INWARD = {"q", "k", "v", "up", "gate", "depth", "conv1", "time", "norm"}


def stem(role: str) -> str:
    """A role without its stream: `q` for `q` and `q_added`."""
    return role.removesuffix(ADDED)


def is_inward(role: str) -> bool:
    """Whether layers of this role put out the inner channels; the others take them in."""
    return stem(role) in _INWARD


@dataclass(frozen=True)
class Shared:
    """A linear of the block that takes the inner channels of two layers, side by side.

    `part` 0 is the first of them (an attention layer), 1 the second (a feed-forward).
    """

    path: str
    part: Literal[0, 1]


OUTPUTS = {"value_output": "out", "feed_forward": "down", "resnet": "conv2"}
"""Kind of group -> the role that puts out what its layer puts out."""


@dataclass(frozen=True)
class Attention:
    """An attention layer of a block; the paths of its linears are relative to `path`.

    The second stream of joint attention is found by the names that diffusers gives its linears.
    Queries and keys stay as they are where they are normalised, or where `fixed_queries` says that
    something else forbids to mix their channels (rotary positions, another product than a softmax).

    `heads` names the attribute that counts the heads. Products of queries and keys are divided by
    the root of their width unless `unscaled`. `tied`: queries, keys and values have one width;
    `fixed_heads`: no head can go (each has a bias on its products).
    """

    path: str
    q: str = "to_q"
    k: str = "to_k"
    v: str = "to_v"
    out: str | Shared = "to_out.0"
    fixed_queries: bool = False
    heads: str = "heads"
    unscaled: bool = False
    tied: bool = False
    fixed_heads: bool = False


SECOND_STREAM = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "out": "to_add_out"}
"""Role -> what diffusers calls the linear of a joint attention layer's second stream."""


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer of a block; whether it is gated is read off the weights.

    `depth` is a depthwise convolution between `up` and `down`, which are then 1 by 1 convolutions.
    `gate` is the linear of the gates where they have one of their own; a model of that class
    without gates calls its only inward linear `plain`. `text`: its tokens are those of the text.
    """

    path: str
    up: str = "net.0.proj"
    down: str | Shared = "net.2"
    depth: str = ""
    gate: str = ""
    plain: str = ""
    text: bool = False


@dataclass(frozen=True)
class ResNet:
    """A block that is itself a ResNet: conv1 -> (+ time) -> norm -> conv2 on its inner channels."""

    conv1: str = "conv1"
    time: str = "time_emb_proj"
    norm: str = "norm2"
    conv2: str = "conv2"


@dataclass(frozen=True)
class Modulation:
    """A linear of a block that makes shifts, scales and gates of one vector per image and step.

    `shared`: the vector is the same for all such layers of the denoiser, so it is recorded once.
    """

    path: str
    shared: bool = True


@dataclass(frozen=True)
class Projection:
    """A linear or convolution from one width of the residual stream to another, or the same.

    An empty `path` stands for the block itself; a block that has no such layer goes without.
    `upsampled`: the block is an upsampler, which doubles the map before this layer.
    """

    path: str = ""
    upsampled: bool = False


Spec = Attention | FeedForward | ResNet | Modulation | Projection


@dataclass(frozen=True)
class Block:
    """The blocks whose module path matches `pattern` in full, and the layers inside each.

    `output` is the place of the hidden states in what a block returns, if that is a tuple.
    """

    pattern: str
    layers: tuple[Spec, ...]
    output: int = 0


@dataclass(frozen=True)
class Given:
    """An argument of the denoiser that is not a float tensor: the value itself."""

    value: Any


@dataclass(frozen=True)
class Integers:
    """The shape of an integer tensor argument."""

    shape: tuple[int, ...]


Shapes = dict[str, Any]
"""Argument -> shape of a float tensor, `Integers`, `Given`, a list (a tuple) or a dict of such."""


@dataclass(frozen=True)
class Family:
    """A model family: the denoiser class, named by string, its blocks and its inputs.

    Attributes:
        denoiser: class name in diffusers, or of a text encoder in transformers.
        blocks: where its layers are.
        inputs: maps the denoiser's config to the shapes of one forward's arguments (batch 1).
        kept: what does not shrink -> why, for the reader.
        text: it is a text encoder: it gets token ids, padding where an `attention_mask` is 0.
        mask: the argument that is 0, or a bias far below 0, for padding of the text.
    """

    denoiser: str
    blocks: tuple[Block, ...]
    inputs: Callable[[Mapping[str, Any]], Shapes]
    kept: Mapping[str, str] = field(default_factory=dict)
    text: bool = False
    mask: str = ""


@dataclass(frozen=True)
class Group:
    """Layers that shrink together.

    Attributes:
        name: path of the layer, with `.qk` or `.vo` for the two halves of an attention layer.
        kind: `query_key`, `value_output`, `feed_forward`, `resnet`, `modulation` or `projection`.
        layer: module path of the attention or feed-forward layer, ResNet, modulation or projection.
        block: module path of the transformer block, the ResNet, or the projection itself.
        paths: role -> module path of the linear, convolution or norm.
        heads: attention heads (1 for the others).
        width: present width: channels per head, hidden units, a ResNet's inner channels, or the
            rank of a modulation or projection.
        gated: `up` and `depth` (feed-forward) or `time` (ResNet) have 2 * width rows.
        step: widths are multiples of this: the channels of a norm group (ResNet only).
        columns: role -> the input columns (start, stop) that are the group's, of a shared linear.
        output: place of the hidden states in what the block returns.
        source: what its statistics are named after, if not the layer: several groups share them.
        largest: the largest width that saves anything, if not the one below the dense one.
        unscaled, tied, fixed_heads, text: see `Attention` and `FeedForward`.
        upsampler: module path of the upsampler whose convolution the layer is.
        query_width: channels per head of its layer's queries; 0 for what is no attention.
        dense_width: what `width` was before the denoiser was slimmed; 0 if it was not.
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
    columns: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)
    output: int = 0
    source: str = ""
    largest: int | None = None
    unscaled: bool = False
    tied: bool = False
    fixed_heads: bool = False
    upsampler: str = ""
    query_width: int = 0
    dense_width: int = 0
    text: bool = False

    @property
    def inner(self) -> int:
        """Inner channels: heads * width."""
        return self.heads * self.width

    def rows(self, role: str, inner: int) -> int:
        """Output rows of an inward layer at `inner` channels."""
        return 2 * inner if self.gated and role in ("up", "depth", "time") else inner

    def streams(self, role: str) -> list[str]:
        """The roles of the group that are `role`, in either stream."""
        return [own for own in (role, role + ADDED) if own in self.paths]

    def input_columns(self, role: str) -> slice:
        """Which input columns of a linear are the group's."""
        return slice(*self.columns[role]) if role in self.columns else slice(None)
