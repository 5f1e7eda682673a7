"""The benchmark's peers on a tiny pipeline: targets met, and nothing touched."""

import copy
import importlib.util
import time

import pytest
import torch

import slimdiff
from peers import PEERS, Job, at_macs, deepcache, int8, weight_bytes
from peers.at_macs import STEPS
from peers.job import fuse_upsamplers_, kept_with, removable, seconds_spared, uniform_sizes
from peers.svd import input_moments, plain_factors, whitened_factors
from slimdiff import costs
from slimdiff.config import TRANSFORMER
from slimdiff.evaluate import generate
from tiny_pipeline import tiny_pipeline

PACKAGES = {"torch-pruning": "torch_pruning", "int8": "torchao", "deepcache": "DeepCache"}
SAMPLING = {"num_inference_steps": 4, "guidance_scale": 2.0}
PROMPTS = ["a red circle", "two blue squares", "night", "a green cat", "sea", "a hat"]
STRUCTURAL = [name for name, peer in PEERS.items() if peer.structural]


def needs(name):
    package = PACKAGES.get(name.split()[0])
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def parts():
    pipe = tiny_pipeline()
    config = slimdiff.CalibrationConfig(batch_size=3, **SAMPLING)
    log = slimdiff.CalibrationConfig(batch_size=3, timestep_weights="log", **SAMPLING)
    recorded = [slimdiff.calibrate(pipe, PROMPTS, each) for each in (config, log)]
    return pipe, *recorded, removable(pipe.unet)


def job_of(parts, share):
    pipe, statistics, log_statistics, total = parts
    remove = max(1, int(share * total))
    return Job(pipe, statistics, log_statistics, PROMPTS, SAMPLING, remove)


def output(unet):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 16, 24, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor(500), encoder_hidden_states=text, return_dict=False)[0]


def relative(found, expected):
    return float((found - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("name", STRUCTURAL)
def test_the_target_is_met_and_the_dense_pipeline_is_untouched(name, parts):
    needs(name)
    job = job_of(parts, 0.3)
    before = {key: value.clone() for key, value in job.pipe.unet.state_dict().items()}
    slim = PEERS[name].slim(job)
    removed = costs.parameters(job.pipe.unet) - costs.parameters(slim)
    assert job.remove <= removed <= job.remove + 0.02 * parts[-1]
    after = job.pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.grad is None for parameter in job.pipe.unet.parameters())


@pytest.mark.parametrize("name", STRUCTURAL)
def test_a_slim_denoiser_takes_the_place_of_the_dense_one(name, parts):
    needs(name)
    job = job_of(parts, 0.3)
    dense, slim = output(job.pipe.unet), output(PEERS[name].slim(job))
    assert slim.isfinite().all()
    assert 0 < relative(slim, dense) < 0.5
    pipe = copy.copy(job.pipe)
    pipe.unet = PEERS[name].slim(job)
    images = generate(pipe, PROMPTS[:1], [0], output_type="latent", **SAMPLING)
    assert torch.isfinite(images[0]).all()


@pytest.mark.parametrize("name", STRUCTURAL)
def test_removing_almost_nothing_changes_almost_nothing(name, parts):
    needs(name)
    job = job_of(parts, 0)
    assert relative(output(PEERS[name].slim(job)), output(job.pipe.unet)) < 1e-3


def half_dead_pipeline(*, heads):
    """Half of every layer is zero: one head of two, or the upper half of each; half the units."""
    pipe = tiny_pipeline()
    for group in slimdiff.groups_of(pipe.unet, TRANSFORMER):
        dead = torch.zeros(group.heads, group.width, dtype=torch.bool)
        if heads and group.kind != "feed_forward":
            dead[1] = True
        else:
            dead[:, group.width // 2 :] = True
        for role, path in group.paths.items():
            linear = pipe.unet.get_submodule(path)
            if role in ("out", "down"):
                linear.weight.data[:, dead.flatten()] = 0
                continue
            rows = dead.flatten().repeat(linear.out_features // dead.numel())
            linear.weight.data[rows] = 0
            if linear.bias is not None:
                linear.bias.data[rows] = 0
    return pipe


@pytest.mark.parametrize("name", ["torch-pruning magnitude", "obs-diff"])
def test_removing_what_is_zero_changes_nothing(name):
    """Widths, heads and the softmax scale are then what they were; and what is dead is found."""
    needs(name)
    pipe = half_dead_pipeline(heads=name == "obs-diff")
    config = slimdiff.CalibrationConfig(batch_size=3, **SAMPLING)
    statistics = slimdiff.calibrate(pipe, PROMPTS[:3], config)
    job = Job(pipe, statistics, None, PROMPTS, SAMPLING, removable(pipe.unet) // 2)
    slim = PEERS[name].slim(job)
    assert costs.parameters(pipe.unet) - costs.parameters(slim) == job.remove
    assert relative(output(slim), output(pipe.unet)) < 1e-9


@pytest.mark.parametrize("name", STRUCTURAL)
def test_too_much_is_refused(name, parts):
    needs(name)
    with pytest.raises(slimdiff.SlimdiffError):
        PEERS[name].slim(job_of(parts, 0.999))


def test_bisection_removes_as_little_as_leaves_the_macs():
    asked = []

    def slim(remove):
        asked.append(remove)
        return remove

    found = at_macs(slim, lambda removed: 5000 - 3 * removed, 4000, most=1024)
    assert 5000 - 3 * found <= 4000 < 5000 - 3 * (found - 1024 // 2**STEPS)
    assert len(asked) == STEPS and found in asked


def test_bisection_works_around_what_a_peer_refuses():
    def slim(remove):
        if remove > 600:
            raise slimdiff.SlimdiffError("600 at most")
        return remove

    found = at_macs(slim, lambda removed: 1000 - removed, 450, most=1000)
    assert 550 <= found <= 555
    with pytest.raises(slimdiff.SlimdiffError, match="600 at most"):
        at_macs(slim, lambda removed: 1000 - removed, 390, most=1000)


@pytest.mark.parametrize("name", ["svd", "obs-diff"])
def test_a_peer_just_meets_a_budget_of_macs(name, parts):
    unet, total = parts[0].unet, parts[-1]

    def slim(remove):
        return PEERS[name].slim(job_of(parts, remove / total))

    def macs(unet):
        return costs.measure(unet, [], costs.example_inputs(parts[0].unet)).macs

    spare = macs(unet) - macs(slim(0.7 * total))
    target = macs(unet) - spare // 2
    found = macs(at_macs(slim, macs, target, total))
    assert target - 0.05 * spare <= found <= target


def test_the_upsamplers_of_a_peer_are_fused_at_no_loss(parts):
    slim = PEERS["obs-diff"].slim(job_of(parts, 0.5))
    call = costs.example_inputs(slim)
    inputs = {name: torch.randn(x.shape, dtype=x.dtype) for name, x in call.items()}
    before = slim(**inputs).sample, costs.measure(slim, [], call).macs
    fuse_upsamplers_(slim)
    torch.testing.assert_close(slim(**inputs).sample, before[0], rtol=1e-4, atol=1e-5)
    assert costs.measure(slim, [], call).macs < before[1]


def test_what_a_peer_keeps_is_counted_when_it_is_used_again():
    unet = torch.nn.Linear(1, 1)
    first = kept_with(unet, "slow", lambda: time.sleep(0.05) or object())
    assert seconds_spared(unet) == 0
    assert kept_with(unet, "slow", object) is first
    assert seconds_spared(unet) >= 0.05


def test_widths_are_uniform(parts):
    job = job_of(parts, 0.5)
    widths = {g.layer: g.width for g in slimdiff.groups_of(job.pipe.unet, TRANSFORMER)}
    shares = [size / widths[layer] for layer, size in uniform_sizes(job).items()]
    assert max(shares) - min(shares) <= 0.15


def test_whitening_lowers_the_error_of_the_output(parts):
    job = job_of(parts, 0.3)
    for path, c_ii in input_moments(job).items():
        w_oi = job.pipe.unet.get_submodule(path).weight.detach().double()
        rank = min(w_oi.shape) // 2
        lost = [
            torch.einsum("oi,ij,oj->", e_oi, c_ii, e_oi)
            for a_or, b_ri in (plain_factors(w_oi, rank), whitened_factors(w_oi, c_ii, rank))
            for e_oi in [w_oi - a_or @ b_ri]
        ]
        assert lost[1] <= lost[0] * (1 + 1e-6)


def test_int8_is_smaller_and_close(parts):
    needs("int8")
    job = job_of(parts, 0.3)
    assert weight_bytes(job.pipe.unet) == 4 * costs.parameters(job.pipe.unet)
    quantised = PEERS["int8"].slim(job)
    linears = [m for m in job.pipe.unet.modules() if isinstance(m, torch.nn.Linear)]
    saved = sum(3 * m.weight.numel() - 5 * m.out_features for m in linears)  # scale, zero point
    assert weight_bytes(quantised) == weight_bytes(job.pipe.unet) - saved
    assert 0 < relative(output(quantised), output(job.pipe.unet)) < 1e-3
    slim = PEERS["svd"].slim(job)
    assert weight_bytes(int8(slim)) < weight_bytes(slim)


def test_deepcache_caches_and_restores(parts):
    needs("deepcache")
    pipe = copy.copy(parts[0])

    def latent():
        return generate(pipe, PROMPTS[:1], [0], output_type="latent", **SAMPLING)[0]

    def replaced():
        return [name for name, m in pipe.unet.named_modules() if "forward" in vars(m)]

    dense = latent()
    with pytest.raises(KeyboardInterrupt), deepcache(pipe):
        assert replaced()
        raise KeyboardInterrupt
    assert not replaced()
    with deepcache(pipe):
        cached = latent()
        torch.testing.assert_close(cached, latent())
    assert cached.isfinite().all()
    assert relative(cached, dense) > 0
    torch.testing.assert_close(latent(), dense)
    with deepcache(pipe, interval=1):
        torch.testing.assert_close(latent(), dense)


def test_a_deepcache_denoiser_works_in_the_pipeline(parts):
    needs("deepcache")
    job = job_of(parts, 0.3)
    pipe = copy.copy(job.pipe)
    pipe.unet = PEERS["deepcache"].slim(job)
    with deepcache(job.pipe):
        expected = generate(job.pipe, PROMPTS[:1], [0], output_type="latent", **SAMPLING)[0]
    found = generate(pipe, PROMPTS[:1], [0], output_type="latent", **SAMPLING)[0]
    torch.testing.assert_close(found, expected)
