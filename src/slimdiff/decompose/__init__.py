"""Weights and second moments in, small maps and error curves out; tensors only.

A *decomposition* of a group knows what every width would cost in error and which maps give that
width. Everything is computed and returned in float64, on the device of the moments; inputs are
never modified, but the moments are kept by reference until the maps have been asked for.
"""

from slimdiff.decompose.attention import QueryKey, ValueOutput, query_key, value_output
from slimdiff.decompose.autocovariance import LAGS, autocovariances
from slimdiff.decompose.decomposition import Decomposition
from slimdiff.decompose.effective import (
    effective_convolution,
    effective_down,
    effective_heads,
    effective_key,
    effective_output,
    effective_product,
)
from slimdiff.decompose.elimination import elimination_order
from slimdiff.decompose.feed_forward import FeedForward, Order, feed_forward, unit_order
from slimdiff.decompose.heads import (
    HeadErrors,
    HeadSelection,
    head_errors,
    head_order,
    maps_of_heads,
    whole_heads,
)
from slimdiff.decompose.linalg import DAMPING, definite_damping
from slimdiff.decompose.low_rank import LowRank, modulation, projection
from slimdiff.decompose.resnet import LAG_DAMPING, ResNetChannels, resnet_channels

__all__ = [
    "DAMPING",
    "LAGS",
    "LAG_DAMPING",
    "Decomposition",
    "FeedForward",
    "HeadErrors",
    "HeadSelection",
    "LowRank",
    "Order",
    "QueryKey",
    "ResNetChannels",
    "ValueOutput",
    "autocovariances",
    "definite_damping",
    "effective_convolution",
    "effective_down",
    "effective_heads",
    "effective_key",
    "effective_output",
    "elimination_order",
    "effective_product",
    "feed_forward",
    "head_errors",
    "head_order",
    "maps_of_heads",
    "modulation",
    "projection",
    "query_key",
    "resnet_channels",
    "unit_order",
    "value_output",
    "whole_heads",
]
