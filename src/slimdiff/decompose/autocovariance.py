"""Autocovariances of a feature map: the moment of a 3 by 3 convolution's unfolded input.

What a 3 by 3 convolution sees at a pixel p is (9 C) numbers: the channels a(p + t) at nine taps t.
Far from the border the moment of two taps depends on their distance alone,
E[a(p + s) a(p + t)^T] = R(t - s), so that 13 matrices of C by C stand for (9 C)^2 entries.

Shape letters: `c` channels, `l` the 13 lags, `w` the 5 frequencies, `n` flattened positions.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

LAGS = [(dy, dx) for dy in range(3) for dx in range(-2, 3) if dy > 0 or dx >= 0]
"""Distances (rows, columns) in one half plane; R(-d) = R(d)^T gives the others."""

ROWS_OF_LAGS = [[lag for lag in LAGS if lag[0] == dy] for dy in range(3)]

TAPS = [(y, x) for y in range(3) for x in range(3)]
"""Order of the taps, that of a flattened kernel."""

FREQUENCIES = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
"""Of a 3 by 3 Fourier transform; the other four are their complex conjugates."""

MULTIPLICITY = [1, 2, 2, 2, 2]
"""How many of the nine frequencies each of `FREQUENCIES` stands for."""


def autocovariances(x_bcyx: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of a(p) a(p + d)^T over the positions p of all images, (13, c, c): one matrix a lag d.

    The map counts as zero outside, which keeps the moment positive semidefinite.
    """
    channels, width = x_bcyx.shape[1], x_bcyx.shape[3]
    # Two columns and two rows of zeros behind each image: a lag is an offset into a flat array, and
    # those of one row follow each other there.
    padded_byxc = pad(x_bcyx.to(dtype).permute(0, 2, 3, 1), (0, 0, 0, 2, 0, 2))
    flat_nc = padded_byxc.contiguous().flatten(0, 2)
    positions = len(flat_nc) - 2 * (width + 2) - 2
    products = []
    for lags in ROWS_OF_LAGS:
        (dy, dx), shape = lags[0], (positions, len(lags) * channels)
        offset = (dy * (width + 2) + dx) * channels
        shifted_nd = flat_nc.as_strided(shape, (channels, 1), flat_nc.storage_offset() + offset)
        products.append(flat_nc[:positions].mT @ shifted_nd)
    return torch.cat(products, 1).view(channels, len(LAGS), channels).transpose(0, 1)


def autocovariance(lags_lcc: Tensor, dy: int, dx: int) -> Tensor:
    """R(dy, dx) = E[a(p) a(p + (dy, dx))^T], (c, c), a view."""
    if (dy, dx) in LAGS:
        return lags_lcc[LAGS.index((dy, dx))]
    return lags_lcc[LAGS.index((-dy, -dx))].mT


def unfolded_moment(lags_lcc: Tensor, rows_r: Tensor, columns_k: Tensor) -> Tensor:
    """Moment (9 r, 9 k) between the taps of some channels and those of others, channel by channel.

    Entry (9 i + s, 9 j + t) is E[a_rows[i](p + s) a_columns[j](p + t)].
    """
    moment = lags_lcc.new_empty(len(rows_r), 9, len(columns_k), 9)
    for s, (sy, sx) in enumerate(TAPS):
        for t, (ty, tx) in enumerate(TAPS):
            covariance_cc = autocovariance(lags_lcc, ty - sy, tx - sx)
            moment[:, s, :, t] = covariance_cc[rows_r][:, columns_k]
    return moment.view(9 * len(rows_r), 9 * len(columns_k))


def unfolded_product(weight_ocyx: Tensor, lags_lcc: Tensor, columns_k: Tensor) -> Tensor:
    """W C (o, 9 k): a kernel times the moment between the taps of all channels and those of some.

    C is `unfolded_moment` of all channels and `columns_k`, which is not formed.
    """
    taps_soc = weight_ocyx.flatten(2).permute(2, 0, 1).contiguous()
    result_okt = weight_ocyx.new_zeros(len(weight_ocyx), len(columns_k), 9)
    for t, (ty, tx) in enumerate(TAPS):
        for s, (sy, sx) in enumerate(TAPS):
            covariance_ck = autocovariance(lags_lcc, ty - sy, tx - sx)[:, columns_k]
            result_okt[:, :, t] += taps_soc[s] @ covariance_ck
    return result_okt.flatten(1)


def spectral_moment(lags_lcc: Tensor) -> Tensor:
    """Moments (w, c, c), complex, of the nine taps' Fourier transform, frequency by frequency.

    They are the diagonal blocks of the unfolded moment in that basis, that is, of its best
    block-circulant approximation (T. Chan, 1988), and as positive semidefinite as itself. With
    u(f) = 1/3 sum_t a(p + t) exp(-2 pi i f t / 3), block f is E[u(f) u(f)^H].
    """
    channels = lags_lcc.shape[-1]
    circulant = lags_lcc.new_zeros(3, 3, channels, channels)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            pairs = (3 - abs(dy)) * (3 - abs(dx))
            circulant[dy % 3, dx % 3] += autocovariance(lags_lcc, dy, dx) * (pairs / 9)
    spectrum = torch.fft.ifft2(circulant, dim=(0, 1), norm="forward")
    return torch.stack([spectrum[f] for f in FREQUENCIES])


def spectral_weight(weight_ocyx: Tensor) -> Tensor:
    """The kernel's (w, o, c) complex weights of the taps' Fourier transform."""
    spectrum = 3 * torch.fft.ifft2(weight_ocyx, dim=(2, 3), norm="backward")
    return torch.stack([spectrum[:, :, fy, fx] for fy, fx in FREQUENCIES])
