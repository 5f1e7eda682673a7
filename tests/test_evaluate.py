import builtins
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slimdiff.errors import SlimdiffError
from slimdiff.evaluate import generate, psnr, ssim, velocity_error, velocity_errors, wilson
from slimdiff.picture import image_grid
from tiny_pipeline import tiny_pipeline

PROMPTS = ["a red circle", "a blue ring", "a green square"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(seed=0)


def scaled(denoiser, factor):
    """A denoiser whose prediction is `factor` times the dense one."""
    other = copy.deepcopy(denoiser)
    with torch.no_grad():
        other.conv_out.weight *= factor
        other.conv_out.bias *= factor
    return other


def test_error_of_a_scaled_denoiser_is_known(pipe):
    others = {"same": copy.deepcopy(pipe.unet), "off": scaled(pipe.unet, 1.1)}
    errors = velocity_errors(pipe, others, PROMPTS, num_inference_steps=3, batch_size=2)
    assert errors["same"].relative == 0
    assert errors["off"].relative == pytest.approx(0.01, rel=1e-3)
    assert all(e == pytest.approx(0.01, rel=1e-3) for e in errors["off"].by_timestep.values())
    assert len(errors["off"].by_timestep) == 3 and errors["off"].calls == 6


def test_error_is_along_the_dense_trajectory_with_both_guidance_halves(pipe):
    seen, inputs = [], []
    slim = scaled(pipe.unet, 1.5)
    slim.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    handle = pipe.unet.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    once = velocity_error(
        pipe, slim, PROMPTS[:2], num_inference_steps=2, guidance_scale=3.0, batch_size=2
    )
    handle.remove()
    assert [x.shape[0] for x in seen] == [4, 4]
    assert all(torch.equal(a, b) for a, b in zip(seen, inputs, strict=True))
    alone = velocity_error(
        pipe, slim, PROMPTS[:2], num_inference_steps=2, guidance_scale=1.0, batch_size=1
    )
    assert seen[-1].shape[0] == 1
    assert once.relative == pytest.approx(0.25, rel=1e-3) == alone.relative


def test_hooks_and_progress_bar_are_restored(pipe):
    pipe.set_progress_bar_config(disable=False, desc="mine")
    velocity_error(pipe, copy.deepcopy(pipe.unet), PROMPTS[:1], num_inference_steps=1)
    assert not pipe.unet._forward_hooks
    assert pipe._progress_bar_config == {"disable": False, "desc": "mine"}


def test_slim_must_be_another_denoiser_of_the_same_dtype(pipe):
    with pytest.raises(SlimdiffError, match="slim: is the dense denoiser itself"):
        velocity_error(pipe, pipe, PROMPTS)
    with pytest.raises(SlimdiffError, match=r"slim: is torch.bfloat16 on cpu"):
        velocity_error(pipe, copy.deepcopy(pipe.unet).bfloat16(), PROMPTS)


def test_noise_does_not_depend_on_the_batch_size(pipe):
    def images(batch_size):
        return generate(
            pipe, PROMPTS, [5, 6, 5], num_inference_steps=2, batch_size=batch_size, output_type="np"
        )

    together, alone = images(3), images(1)
    np.testing.assert_allclose(np.stack(together), np.stack(alone), atol=2e-3)
    other = generate(pipe, PROMPTS[:1], [6], num_inference_steps=2, output_type="np")[0]
    assert np.abs(other - alone[0]).max() > 1e-2


@pytest.mark.parametrize(("prompts", "seeds"), [([], []), (["a"], [1, 2])])
def test_prompts_and_seeds_must_match(pipe, prompts, seeds):
    with pytest.raises(SlimdiffError, match=f"got {len(prompts)} prompts, {len(seeds)} seeds"):
        generate(pipe, prompts, seeds)


def flat(value, size=(32, 32)):
    return Image.new("RGB", size, (value,) * 3)


def noisy(seed, size=(32, 32)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def test_psnr_is_the_mean_over_images():
    expected = -20 * np.log10(51 / 255)
    assert psnr([flat(51)], [flat(102)]) == pytest.approx(expected, abs=1e-4)
    assert psnr([flat(51), flat(7)], [flat(102), flat(7)]) == pytest.approx((expected + 100) / 2)


def test_ssim_of_equal_and_of_unrelated_images():
    assert ssim([noisy(0)], [noisy(0)]) == pytest.approx(1, abs=1e-5)
    assert ssim([noisy(0)], [noisy(1)]) < 0.2


def test_image_pairs_must_match():
    with pytest.raises(SlimdiffError, match="2 images against 1"):
        psnr([flat(1), flat(2)], [flat(1)])
    with pytest.raises(SlimdiffError, match="all of one size"):
        ssim([flat(1)], [flat(1, (16, 32))])


def test_without_torchmetrics_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("torchmetrics"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SlimdiffError, match=r"pip install 'slimdiff\[metrics\]'"):
        psnr([flat(1)], [flat(1)])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_holds_the_share_and_narrows(n, share):
    k = round(share * n)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1
    # its bounds solve (share - p)^2 = z^2 p (1 - p) / n
    for p in (low, high):
        assert (k / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-9)


def test_wilson_refuses_impossible_counts():
    with pytest.raises(SlimdiffError, match="3 of 2"):
        wilson(3, 2)


def test_grid_shows_every_image_in_its_place():
    colours = {10: (10, 99, 0), 20: (20, 99, 0), 30: (30, 99, 0), 40: (40, 99, 0)}
    image = {v: Image.new("RGB", (32, 32), colour) for v, colour in colours.items()}
    rows = {"dense": [image[10], image[20]], "slim": [image[30], image[40]]}
    grid = image_grid(rows, ["a long prompt that has to be wrapped into lines", "short"])
    pixels = np.asarray(grid)
    at = {v: np.argwhere((pixels == colour).all(-1)) for v, colour in colours.items()}
    assert {len(places) for places in at.values()} == {160 * 160}
    first = {v: places.min(0) for v, places in at.items()}
    assert first[10][0] == first[20][0] < first[30][0] == first[40][0]
    assert first[10][1] == first[30][1] < first[20][1] == first[40][1]


def test_grid_needs_one_image_per_prompt():
    with pytest.raises(SlimdiffError, match="row 'slim' has 1 images for 2 prompts"):
        image_grid({"dense": [flat(1)] * 2, "slim": [flat(2)]}, ["a", "b"])
    with pytest.raises(SlimdiffError, match="expected at least one"):
        image_grid({}, ["a"])
