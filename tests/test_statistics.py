"""Statistics and probes: sums that add up, survive a round trip, and refuse what is wrong."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import slimdiff
from slimdiff.calls import fingerprints, flatten, nest
from slimdiff.decompose import LAGS
from slimdiff.errors import SlimdiffError
from slimdiff.guided import Predictions, interval
from slimdiff.probes import Probes
from slimdiff.recorder import Recorder
from slimdiff.statistics import WEIGHTS_FILE, Statistics
from tiny_models import TINY_MODELS


def empty(seed: int = 0) -> Statistics:
    return Statistics("Tiny", Probes(4, seed))


def recorder(statistics: Statistics, tokens: int = 10_000) -> Recorder:
    return Recorder(statistics, seed=0, tokens_per_sample=tokens, dtype=torch.float64)


def recorded(calls: slice) -> Statistics:
    model, inputs = TINY_MODELS["sd1"]()
    with slimdiff.record(model) as statistics:
        for call in inputs[calls]:
            model(**call)
    return statistics


def test_moments_equal_those_of_all_tokens_at_once() -> None:
    x_bti = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    statistics = empty()
    for part in x_bti.split(1):
        recorder(statistics).moment("layer/h", part)
        recorder(statistics).keys("layer/k", part, heads=2)
    x_ni = x_bti.flatten(0, 1).double()
    want = x_ni.mT @ x_ni / len(x_ni)
    torch.testing.assert_close(statistics.mean("layer/h"), want, rtol=1e-6, atol=1e-6)
    centred = (x_bti - x_bti.mean(1, keepdim=True)).flatten(0, 1).double()
    second_head = centred[:, 3:].mT @ centred[:, 3:] / len(centred)
    got = statistics.mean("layer/k_centred")[1]
    torch.testing.assert_close(got, second_head, rtol=1e-6, atol=1e-6)
    magnitude = statistics.mean("layer/h_magnitude")
    torch.testing.assert_close(magnitude, x_ni.abs().mean(0), rtol=1e-6, atol=1e-6)


def test_weights_weigh() -> None:
    one, three = torch.ones(1, 1, 2), 3 * torch.ones(1, 1, 2)
    statistics = empty()
    weighing = recorder(statistics)
    for x, weight in ((one, 3.0), (three, 1.0)):
        weighing.weight = weight
        weighing.moment("layer/h", x)
    assert float(statistics.mean("layer/h")[0, 1]) == pytest.approx((3 * 1 + 1 * 9) / 4)


def test_subsampled_rows_are_the_same_every_time_and_unbiased() -> None:
    x = torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(0))
    first, second = (recorder(empty(), tokens=64).rows(x) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (2, 64, 3)
    statistics = empty()
    for call in range(50):
        statistics.calls = call
        recorder(statistics, tokens=64).moment("layer/h", x)
    x_ni = x.flatten(0, 1).double()
    full = x_ni.mT @ x_ni / len(x_ni)
    torch.testing.assert_close(statistics.mean("layer/h"), full, rtol=0.05, atol=0.05)


def test_parts_add_up_to_the_whole() -> None:
    whole = recorded(slice(0, 4))
    parts = Statistics.merge([recorded(slice(0, 2)), recorded(slice(2, 4))])
    assert parts.weights == whole.weights and parts.calls == whole.calls
    for name, total in whole.sums.items():
        torch.testing.assert_close(parts.sums[name], total, rtol=1e-5, atol=1e-6)  # float32's
    assert parts.probes.rows.keys() == whole.probes.rows.keys()


def test_round_trip_is_exact(tmp_path: Path) -> None:
    statistics = recorded(slice(0, 4))
    statistics.save(tmp_path / "statistics")
    loaded = Statistics.load(tmp_path / "statistics")
    assert loaded.weights == statistics.weights and loaded.source == statistics.source
    for name, total in statistics.sums.items():
        assert torch.equal(loaded.sums[name], total)
    for key, probe in statistics.probes.rows.items():
        assert loaded.probes.rows[key].constants == probe.constants
        for path, tensor in probe.tensors.items():
            assert torch.equal(loaded.probes.rows[key].tensors[path], tensor)


def test_damaged_missing_and_foreign_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(slimdiff.SlimdiffError, match="no such file"):
        Statistics.load(tmp_path)
    statistics = recorded(slice(0, 1))
    statistics.save(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(slimdiff.SlimdiffError, match="damaged"):
        Statistics.load(tmp_path)
    other, _ = TINY_MODELS["sd2"]()
    foreign = recorded(slice(0, 1))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1/q"
    foreign.sums[name] = foreign.sums[name][:1]
    with pytest.raises(slimdiff.SlimdiffError, match="another model"):
        slimdiff.allocate(other, foreign, slimdiff.Budget(params=0.9))


def test_future_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = recorded(slice(0, 1))
    with monkeypatch.context() as patch:
        patch.setattr("slimdiff.statistics.VERSION", 99)
        statistics.save(tmp_path)
    with pytest.raises(slimdiff.SlimdiffError, match="version 99"):
        Statistics.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_and_names_the_module(value: float) -> None:
    model, inputs = TINY_MODELS["sd1"]()
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    with torch.no_grad():
        model.get_submodule(f"{path}.to_v").weight[0, 0] = value
    with pytest.raises(slimdiff.SlimdiffError, match=f"{path}/v: activation is NaN or infinite"):
        with slimdiff.record(model):
            model(**inputs[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_tokens_no_mean() -> None:
    model, inputs = TINY_MODELS["sd1"]()
    with slimdiff.record(model) as statistics:
        pass
    with pytest.raises(slimdiff.SlimdiffError, match="statistics are empty"):
        slimdiff.allocate(model, statistics, slimdiff.Budget(params=0.9))
    with pytest.raises(slimdiff.SlimdiffError, match="no tokens"):
        statistics.mean("mid_block/q")


def arguments(value: float) -> dict[str, Any]:
    return {
        "sample": torch.full((2, 1, 2, 2), value) + torch.arange(2).view(2, 1, 1, 1),
        "timestep": torch.tensor(3),
        "added_cond_kwargs": {"time_ids": torch.zeros(2, 6)},
        "return_dict": False,
        "flag": True,
        "nothing": None,
    }


@given(values=st.lists(st.integers(0, 10_000), min_size=1, max_size=20, unique=True))
def test_the_reservoir_forgets_the_order_and_the_split(values: list[int]) -> None:
    forward, backward, left, right = (Probes(4) for _ in range(4))
    for value in values:
        forward.offer(arguments(3.0 * value))
    for i, value in enumerate(reversed(values)):
        backward.offer(arguments(3.0 * value))
        (left if i % 2 else right).offer(arguments(3.0 * value))
    left.merge([right])
    assert len(forward.rows) == min(4, 2 * len(values))
    assert forward.rows.keys() == backward.rows.keys() == left.rows.keys()


@given(times=st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_probes_are_spread_over_the_timesteps(times: list[int]) -> None:
    whole, left, right = (Probes(5) for _ in range(3))
    for i, time in enumerate(times):
        call = arguments(3.0 * i) | {"timestep": torch.tensor(time)}
        for probes in (whole, (left, right)[i % 2]):
            probes.offer(call)
    left.merge([right])
    assert whole.rows.keys() == left.rows.keys()
    steps = [probe.timestep for probe in whole.rows.values()]
    assert len(set(steps)) == min(5, len(set(times)))
    offered = {step: 2 * times.count(step) for step in set(times)}
    spare = {step for step, count in offered.items() if steps.count(step) < count}
    assert all(
        steps.count(s) <= min((steps.count(t) for t in spare), default=99) + 1 for s in steps
    )


def test_probes_come_back_as_calls() -> None:
    probes = Probes(8)
    probes.offer(arguments(1.0))
    (call,) = probes.batches(8)
    assert call["sample"].shape == (2, 1, 2, 2) and call["timestep"].tolist() == [3, 3]
    assert call["added_cond_kwargs"]["time_ids"].shape == (2, 6)
    assert call["flag"] is True and "nothing" not in call
    assert len(probes.batches(1)) == 2


def test_flatten_and_nest_are_inverse() -> None:
    tensors, constants = flatten(arguments(0.0))
    nested = nest(tensors | constants)
    assert set(nested) == {"sample", "timestep", "added_cond_kwargs", "flag"}
    assert torch.equal(nested["added_cond_kwargs"]["time_ids"], torch.zeros(2, 6))


def test_merging_runs_that_were_sampled_differently_warns(caplog):
    parts = [
        Statistics("X", Probes(1), source={"config": {"num_inference_steps": n, "seed": n}})
        for n in (2, 2, 3)
    ]
    Statistics.merge(parts[:2])
    assert not caplog.records
    Statistics.merge(parts)
    assert "sampled with different num_inference_steps" in caplog.text


def _recorded_lags(x: Tensor, calls: int = 1, tokens: int = 256) -> Statistics:
    statistics = Statistics("Toy", Probes(1))
    recorder = Recorder(statistics, seed=0, tokens_per_sample=tokens, dtype=torch.float64)
    for _ in range(calls):
        recorder.lags("r/lags", x)
        recorder.end_call()
    return statistics


def test_lags_of_a_small_map_are_those_of_all_its_images():
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    mean = _recorded_lags(x).mean("r/lags")
    pixels = 3 * 5 * 6
    energy = torch.einsum("bcyx,bdyx->cd", x, x).double() / pixels
    right = torch.einsum("bcyx,bdyx->cd", x[..., :-1], x[..., 1:]).double() / pixels
    torch.testing.assert_close(mean[LAGS.index((0, 0))], energy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean[LAGS.index((0, 1))], right, rtol=1e-5, atol=1e-6)


def test_lags_of_large_maps_take_few_images_and_always_one_at_first():
    x = torch.ones(2, 4, 32, 32)
    once = _recorded_lags(x, tokens=16)
    assert once.weights["r/lags"] == 32 * 32
    many = _recorded_lags(x, calls=200, tokens=16)
    images = many.weights["r/lags"] / 32**2
    assert 1 <= images <= 20  # expected: 200 calls * 2 images * 16 / 1024 = 6.25
    assert _recorded_lags(x, calls=200, tokens=16).weights == many.weights


def test_lags_of_what_is_not_finite_are_refused():
    with pytest.raises(SlimdiffError, match="r/lags: activation is NaN"):
        _recorded_lags(torch.full((1, 4, 5, 6), torch.nan))


def test_a_block_that_changes_its_channels_turns_everything():
    statistics = Statistics("Toy", Probes(1))
    recorder = Recorder(statistics, seed=0, tokens_per_sample=4, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 3)
    recorder.influence("same", x, x)
    recorder.influence("other", x, torch.randn(2, 6, 3, 3))
    assert float(statistics.mean("same")) == pytest.approx(0, abs=1e-6)
    assert float(statistics.mean("other")) == 1.0


def guided_call(time: float, seeds: list[int]) -> dict[str, Any]:
    """Both halves of guidance: the same latents and time, the empty prompt and prompts.

    The first 300 values of all prompts are alike, as the first tokens of CLIP's states are.
    """
    latents = torch.stack([_noise(seed, 4) + time for seed in seeds])
    texts = torch.stack([torch.cat([torch.ones(300), _noise(100 + s, 4)]) for s in seeds])
    empty = torch.cat([torch.ones(300), torch.zeros(4)]).expand_as(texts)
    return {
        "sample": torch.cat([latents, latents]),
        "timestep": torch.tensor(time),
        "encoder_hidden_states": torch.cat([empty, texts]),
    }


def _noise(seed: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


TIMES = (1.0, 500.0, 900.0, 999.0)


def guided_probes(capacity: int = 8, *, apart: bool = False) -> Probes:
    """Of six prompts; `apart`: the pipeline calls its denoiser once for each half."""
    probes = Probes(capacity, guidance=2.0)
    for time in TIMES:
        call = guided_call(time, list(range(6)))
        halves = [slice(6, 12), slice(0, 6)] if apart else [slice(0, 12)]
        for half in halves:
            own = {n: x if x.ndim == 0 else x[half] for n, x in call.items()}
            probes.offer(own)
    return probes


def test_under_guidance_probes_hold_both_halves_and_distinct_prompts() -> None:
    together, apart = guided_probes(), guided_probes(apart=True)
    assert together.rows.keys() == apart.rows.keys()
    for probes in (together, apart):
        rows = Counter(probe.point for probe in probes.rows.values())
        assert list(rows.values()) == [2] * 8
        empty = probes.unguided_prompt()
        without = [probe for probe in probes.rows.values() if probe.prompt == empty]
        assert len(without) == 8, "half of the rows, as they are sampled"
        assert all(not p.tensors["encoder_hidden_states"][0, -4:].any() for p in without)
        assert Counter(p.timestep for p in without) == dict.fromkeys(TIMES, 2)


def test_rows_that_differ_anywhere_are_other_probes() -> None:
    call = guided_call(1.0, [0])
    changed = {name: x.clone() for name, x in call.items()}
    changed["encoder_hidden_states"][:, -1] += 1e-6
    probes = Probes(8)
    probes.offer(call)
    probes.offer(changed)
    assert len(probes.rows) == 4 and len({probe.point for probe in probes.rows.values()}) == 1


def test_a_hash_is_of_the_whole_row_and_of_no_other() -> None:
    x = _noise(0, 3000).reshape(3, 1000)
    whole = fingerprints({"x": x, "shared": x.T}, 3)
    alone = [fingerprints({"x": x[i : i + 1]}, 1)["x"][0] for i in range(3)]
    assert whole["x"] == alone and len(set(alone)) == 3 and len(set(whole["shared"])) == 1
    changed = x.clone()
    changed[1, 999] *= 1 + 1e-6
    other = fingerprints({"x": changed}, 3)["x"]
    assert [a == b for a, b in zip(other, alone, strict=True)] == [True, False, True]
    swapped = x[:, [1, 0, *range(2, 1000)]]
    assert all(a != b for a, b in zip(fingerprints({"x": swapped}, 3)["x"], alone, strict=True))


def test_probes_to_judge_by_are_of_other_prompts_than_those_to_choose_by() -> None:
    probes = guided_probes(12)
    chosen, judging = probes.halves()
    assert not set(chosen.rows) & set(judging.rows)
    assert set(chosen.rows) | set(judging.rows) == set(probes.rows)
    texts = [set(half.prompts().values()) for half in (chosen, judging)]
    assert not texts[0] & texts[1] and texts[0] and texts[1]
    assert abs(len(chosen.rows) - len(judging.rows)) <= 8


def test_probes_of_one_prompt_are_shared_out_by_timestep() -> None:
    probes = Probes(8)
    for time in TIMES:
        for seed in range(3):
            probes.offer({"sample": _noise(seed, 2)[None] + time, "timestep": torch.tensor([time])})
    chosen, judging = probes.halves()
    assert not set(chosen.rows) & set(judging.rows)
    times = [sorted(p.timestep or 0 for p in half.rows.values()) for half in (chosen, judging)]
    assert times == [list(TIMES)] * 2


def test_errors_are_those_of_the_guided_prediction() -> None:
    probes = guided_probes(4)
    rows = [probe for call in probes.calls(3) for probe in call]
    outputs = torch.stack([_noise(i, 5) for i in range(len(rows))]).double()
    calls = list(outputs.split([len(call) for call in probes.calls(3)]))
    empty = probes.unguided_prompt()
    wanted = []
    for point in dict.fromkeys(probe.point for probe in rows):
        own = [i for i, probe in enumerate(rows) if probe.point == point]
        u, c = sorted(own, key=lambda i: rows[i].prompt != empty)
        wanted.append((outputs[u] + 2.0 * (outputs[c] - outputs[u])).square().sum())
    guided = Predictions.of(probes, 3, guided=True).energy(calls)
    torch.testing.assert_close(guided, torch.stack(wanted))
    plain = Predictions.of(probes, 3, guided=False).energy(calls)
    assert float(plain.sum()) == pytest.approx(float(outputs.square().sum()))
    unknown = Probes(4, rows=probes.rows)
    torch.testing.assert_close(Predictions.of(unknown, 3, guided=True).energy(calls), plain)


def test_an_interval_holds_the_ratio_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    held, tries = 0, 400
    for _ in range(tries):
        of_prompt = torch.empty(8).log_normal_(0.0, 0.5, generator=generator).repeat_interleave(3)
        squared = of_prompt * torch.empty(24).log_normal_(0.0, 0.2, generator=generator)
        prompts = [str(i // 3) for i in range(24)]
        ends = interval(squared.double(), torch.ones(24, dtype=torch.float64), prompts)
        assert ends is not None
        held += ends[0] <= math.exp(0.125 + 0.02) <= ends[1]
    assert 0.88 < held / tries < 0.99
    assert interval(torch.ones(2), torch.ones(2), ["one", "one"]) is None


def test_a_single_probe_is_in_both_halves() -> None:
    probes = Probes(1)
    probes.offer({"sample": torch.ones(1, 2), "timestep": torch.tensor([1.0])})
    assert [list(half.rows) for half in probes.halves()] == [list(probes.rows)] * 2
    assert [half.rows for half in Probes(4).halves()] == [{}, {}]
