"""Scales of channels: a factor that one layer puts on a channel and the next takes off again.

Such factors change nothing that a denoiser puts out, so they must not change what is kept of it.
Decompositions divide every channel by its scale, work on channels of equal energy, and take the
scale into the maps.

Shape letters: `n` channels, `h` heads of width `e`.
"""

import torch
from torch import Tensor

SILENT = 1e-200
"""Energies up to this are those of a channel that never speaks; roots of others can be divided by.
"""


def scales_of(c_nn: Tensor) -> Tensor:
    """The root mean square (..., n) of each channel of a moment (..., n, n), float64.

    A channel that never speaks gets the geometric mean of those that do; 1 where none does.
    """
    energy_n = c_nn.diagonal(dim1=-2, dim2=-1).double()
    speaks_n = energy_n > SILENT
    log_n = torch.where(speaks_n, energy_n, 1.0).log().div(2)
    level = log_n.sum(-1, keepdim=True) / speaks_n.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(speaks_n, log_n, level).exp()


def rescaled(c_nn: Tensor, scale_n: Tensor) -> Tensor:
    """The moment (..., n, n) of channels that are divided by their scales, in float64."""
    return c_nn.double() / (scale_n.unsqueeze(-1) * scale_n.unsqueeze(-2))


def level_of(scale_he: Tensor) -> Tensor:
    """The power of two (h, 1) nearest to the geometric mean of each head's scales.

    It keeps a slim head in the range of the dense one, and multiplying by it rounds nothing.
    """
    return scale_he.log2().mean(-1, keepdim=True).round().exp2()
