"""ResNet channels: autocovariances, norm-group selection and refit against brute force."""

import itertools

import pytest
import torch
from torch import Tensor

from slimdiff.decompose import LAGS, autocovariances, resnet_channels
from slimdiff.decompose.autocovariance import (
    FREQUENCIES,
    MULTIPLICITY,
    spectral_moment,
    spectral_weight,
    unfolded_moment,
    unfolded_product,
)

CHANNELS, GROUPS = 6, 3


def feature_map(batch: int = 2, size: int = 24, channels: int = CHANNELS) -> Tensor:
    """Smooth, correlated, positive on average: as after an activation."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, channels, size + 2, size + 2, generator=generator)
    mix = torch.randn(channels, channels, 3, 3, generator=generator).double()
    return torch.nn.functional.silu(torch.nn.functional.conv2d(noise.double(), mix) / 3)


def lags_of(x: Tensor, weight: float = 1.0) -> Tensor:
    sums = weight * autocovariances(x, torch.float64)
    return sums / (x.shape[0] * x.shape[2] * x.shape[3])


def kernel(outputs: int = 4, channels: int = CHANNELS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(outputs, channels, 3, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_autocovariances_are_sums_over_pairs_of_pixels(size):
    x = feature_map(size=size)
    lags = lags_of(x) * x.shape[0] * size * size
    for lag, (dy, dx) in enumerate(LAGS):
        expected = torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64)
        for b, y, z in itertools.product(range(2), range(size), range(size)):
            if 0 <= y + dy < size and 0 <= z + dx < size:
                expected += torch.outer(x[b, :, y, z], x[b, :, y + dy, z + dx])
        torch.testing.assert_close(lags[lag], expected)


def test_unfolded_moment_is_that_of_a_padded_image():
    """With three zeros around the image the unfolded input's moment is shift invariant exactly."""
    x = torch.nn.functional.pad(feature_map(), (3, 3, 3, 3))
    patches = torch.nn.functional.unfold(x, 3, padding=1)
    expected = torch.einsum("bin,bjn->ij", patches, patches) / (2 * x.shape[-1] ** 2)
    every = torch.arange(CHANNELS)
    torch.testing.assert_close(unfolded_moment(lags_of(x), every, every), expected)
    some = torch.tensor([4, 1])
    rows = (some[:, None] * 9 + torch.arange(9)).flatten()
    torch.testing.assert_close(unfolded_moment(lags_of(x), some, every), expected[rows])
    product = unfolded_product(kernel(), lags_of(x), some)
    torch.testing.assert_close(product, kernel().flatten(1) @ expected[:, rows])


def test_frequencies_hold_the_energy_of_the_output_of_a_constant_map():
    """On constant maps only the zero frequency has energy, and it has all of the output's."""
    value = torch.arange(1.0, CHANNELS + 1, dtype=torch.float64)
    lags = torch.outer(value, value).expand(len(LAGS), -1, -1)
    moments, weights = spectral_moment(lags), spectral_weight(kernel())
    energy = [
        float((w @ m @ w.mH).diagonal().sum().real) for w, m in zip(weights, moments, strict=True)
    ]
    output = kernel().sum((2, 3)) @ value
    assert energy[0] == pytest.approx(float(output.square().sum()))
    assert max(abs(e) for e in energy[1:]) < 1e-9 * energy[0]
    assert len(FREQUENCIES) == len(MULTIPLICITY) and sum(MULTIPLICITY) == 9


def test_frequencies_are_the_diagonal_blocks_of_the_transformed_moment():
    lags = lags_of(feature_map())
    every = torch.arange(CHANNELS)
    moment = unfolded_moment(lags, every, every).view(CHANNELS, 9, CHANNELS, 9).to(torch.cdouble)
    for block, (fy, fx) in zip(spectral_moment(lags), FREQUENCIES, strict=True):
        angle = [2 * torch.pi * (fy * y + fx * x) / 3 for y in range(3) for x in range(3)]
        wave = torch.exp(-1j * torch.tensor(angle, dtype=torch.float64)) / 3
        expected = torch.einsum("s,csdt,t->cd", wave, moment, wave.conj())
        torch.testing.assert_close(block, expected)


def test_errors_and_maps_are_those_of_least_squares():
    x = torch.nn.functional.pad(feature_map(), (3, 3, 3, 3))
    weight = kernel()
    found = resnet_channels(weight, lags_of(x), GROUPS, damping=1e-12)
    dense = torch.nn.functional.conv2d(x, weight, padding=1)
    pixels = x.shape[0] * x.shape[-1] ** 2
    for width in (2, 4):
        maps = found.maps(width)
        kept = x[:, maps["channels"]]
        slim = torch.nn.functional.conv2d(kept, maps["weight"], padding=1)
        error = float((slim - dense).square().sum()) / pixels
        assert error == pytest.approx(float(found.errors[width]), rel=1e-6)
        patches = torch.nn.functional.unfold(kept, 3, padding=1).transpose(1, 2).flatten(0, 1)
        target = dense.flatten(2).transpose(1, 2).flatten(0, 1)
        best = torch.linalg.lstsq(patches, target).solution
        torch.testing.assert_close(maps["weight"].flatten(1), best.mT, rtol=1e-4, atol=1e-6)
    assert found.errors[-1] == 0 and found.errors[5] == found.errors[4]


def test_whole_norm_groups_go_and_full_width_is_the_identity():
    found = resnet_channels(kernel(), lags_of(feature_map()), GROUPS)
    groups = {int(c) // 2 for c in found.maps(4)["channels"]}
    assert len(groups) == 2
    torch.testing.assert_close(found.maps(6)["weight"], kernel())
    assert found.maps(6)["channels"].tolist() == list(range(6))


def test_elimination_finds_the_group_that_costs_least():
    """One of two groups that tell the same goes first, though a third is the smallest."""
    x = feature_map()
    x[:, 2:4] = 3 * x[:, 0:2]
    x[:, 4:6] /= 10
    lags = lags_of(x)
    orders = {
        order: resnet_channels(kernel(), lags, GROUPS, order=order, damping=1e-6).errors
        for order in ("elimination", "magnitude", "leverage")
    }
    assert orders["elimination"][4] < 1e-2 * orders["magnitude"][4]
    assert resnet_channels(kernel(), lags, GROUPS, order="magnitude").order_c[0] in (2, 3)


def test_without_refit_the_error_is_that_of_leaving_channels_out():
    x = torch.nn.functional.pad(feature_map(), (3, 3, 3, 3))
    found = resnet_channels(kernel(), lags_of(x), GROUPS, refit=False)
    gone = torch.ones(CHANNELS, dtype=torch.bool)
    gone[found.maps(4)["channels"]] = False
    lost = torch.nn.functional.conv2d(x[:, gone], kernel()[:, gone], padding=1)
    expected = float(lost.square().sum()) / (2 * x.shape[-1] ** 2)
    assert float(found.errors[4]) == pytest.approx(expected)


@pytest.mark.parametrize("lags", [torch.zeros(13, 6, 6), -torch.eye(6).expand(13, 6, 6)])
def test_singular_and_indefinite_moments_give_finite_weights(lags):
    found = resnet_channels(kernel(), lags, GROUPS)
    assert found.errors.isfinite().all() and found.maps(4)["weight"].isfinite().all()
    assert found.missing > 0 or float(lags.sum()) < 0


def test_what_is_not_a_moment_is_refused():
    with pytest.raises(ValueError, match="lags_lcc is"):
        resnet_channels(kernel(), torch.zeros(13, 5, 5), GROUPS)
    with pytest.raises(ValueError, match="infinities or NaN"):
        resnet_channels(kernel(), torch.full((13, 6, 6), torch.nan), GROUPS)
    with pytest.raises(ValueError, match="3 by 3"):
        resnet_channels(kernel()[..., :1], torch.zeros(13, 6, 6), GROUPS)
    with pytest.raises(ValueError, match="order must be"):
        resnet_channels(kernel(), torch.zeros(13, 6, 6), GROUPS, order="random")
