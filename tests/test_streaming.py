"""Rewriting from shards to shards gives what rewriting in memory gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import slimdiff
from slimdiff.errors import SlimdiffError
from slimdiff.shards import Shards, ShardWriter, join
from slimdiff.streaming import rewrite_folder, rewrite_pipeline_folder
from test_contract import Case, outputs
from tiny_pipeline import tiny_pipeline

NAMES = ("sd1", "sd3", "flux", "sana", "pixart")


def planned(case: Case) -> slimdiff.Plan:
    budget = slimdiff.Budget(macs=0.8)  # upsamplers are fused
    return slimdiff.allocate(case.model, case.statistics, budget, allocation="uniform")


@pytest.mark.parametrize("name", NAMES)
def test_the_same_files_as_in_memory(name: str, tmp_path: Path) -> None:
    case = Case(name)
    plan = planned(case)
    case.model.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    case.statistics.save(tmp_path / "statistics")
    stored = slimdiff.Statistics.open(tmp_path / "statistics")
    out = rewrite_folder(
        tmp_path / "dense", tmp_path / "streamed", stored, plan, max_shard_bytes=30_000
    )
    slim = slimdiff.rewrite(case.copy(), case.statistics, plan)
    slimdiff.save(slim, tmp_path / "saved")
    streamed, saved = slimdiff.load(out), slimdiff.load(tmp_path / "saved")
    assert len(list(out.glob("*-of-*.safetensors"))) > 1
    assert type(streamed) is type(saved) and dict(streamed.config) | {"_name_or_path": ""} == dict(
        saved.config
    ) | {"_name_or_path": ""}
    for key, tensor in saved.state_dict().items():
        assert torch.equal(streamed.state_dict()[key], tensor), key
    assert streamed.slim_record.plan == saved.slim_record.plan
    for key, tensor in saved.slim_record.maps.items():
        assert torch.equal(streamed.slim_record.maps[key], tensor), key
    for got, want in zip(outputs(streamed, case.inputs), outputs(saved, case.inputs), strict=True):
        assert torch.equal(got, want)
    assert not list(out.glob(".*"))


def test_half_precision_shards_with_a_variant(tmp_path: Path) -> None:
    case = Case("sd3")
    plan = planned(case)
    case.copy().half().save_pretrained(tmp_path / "dense", variant="fp16")
    out = rewrite_folder(
        tmp_path / "dense", tmp_path / "slim", case.statistics, plan, variant="fp16"
    )
    slim = slimdiff.load(out, variant="fp16", torch_dtype=torch.float16)
    assert {p.dtype for p in slim.parameters()} == {torch.float16}
    assert sum(p.numel() for p in slim.parameters()) == plan.figures["params"]


def test_a_whole_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "dense")
    config = slimdiff.CalibrationConfig(num_inference_steps=2)
    statistics = slimdiff.calibrate(pipe, ["a ring", "a star"], config)
    budget = slimdiff.Budget(params=0.9)
    plan = slimdiff.allocate(pipe.unet, statistics, budget, allocation="uniform")
    out = rewrite_pipeline_folder(tmp_path / "dense", tmp_path / "slim", statistics, plan)
    loaded = slimdiff.load_pipeline(out)
    slimdiff.rewrite(pipe.unet, statistics, plan)
    for key, tensor in pipe.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[key], tensor)


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    case = Case("dit")
    plan = planned(case)
    out = tmp_path / "slim"
    case.model.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    other = slimdiff.Statistics("DiTTransformer2DModel", slimdiff.statistics.Probes(1))
    with pytest.raises(SlimdiffError, match="Calibrate again"):
        rewrite_folder(tmp_path / "dense", out, other, plan)
    index = tmp_path / "dense" / "diffusion_pytorch_model.safetensors.index.json"
    kept = json.loads(index.read_text())
    del kept["weight_map"]["transformer_blocks.0.ff.net.2.weight"]
    index.write_text(json.dumps(kept))
    with pytest.raises(SlimdiffError, match=r"ff\.net\.2\.weight.*two models mixed"):
        rewrite_folder(tmp_path / "dense", out, case.statistics, plan)
    index.unlink()
    with pytest.raises(SlimdiffError, match="expected safetensors"):
        rewrite_folder(tmp_path / "dense", out, case.statistics, plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), limit=st.integers(1, 200))
def test_shards_hold_what_was_added_and_no_more_than_they_may(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, "diffusion_pytorch_model", None, limit)
    tensors = {f"t{i}": torch.arange(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    shards = Shards(folder)
    assert set(shards.names) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(shards.read(name), tensor)
    for path in set(shards.names.values()):
        held = [tensor.numel() for name, tensor in tensors.items() if shards.names[name] == path]
        assert sum(held) <= limit or sum(size > 0 for size in held) == 1


@given(groups=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4))
def test_joined_files_are_one(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    tensors, parts = {}, []
    for i, sizes in enumerate(groups):
        own = {f"{i}.{j}": torch.rand(size, 2).half() for j, size in enumerate(sizes)}
        parts.append(folder / f"part-{i}")
        save_file(own, parts[-1])
        tensors |= own
    join(parts, folder / "all.safetensors")
    found = load_file(folder / "all.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
