"""`--low-memory`: the same folder as in memory, from statistics that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import slimdiff
from slimdiff.errors import SlimdiffError
from slimdiff.low_memory import compress_folder
from test_cli import shell
from tiny_pipeline import tiny_pipeline


class Recorded:
    """A tiny pipeline's folder, and statistics of it."""

    def __init__(self, folder: Path) -> None:
        self.dense, self.statistics = folder / "dense", folder / "statistics"
        self.pipe: Any = tiny_pipeline()
        self.pipe.save_pretrained(self.dense)
        (self.dense / "README.md").write_text("the dense model's card")
        (self.dense / "LICENSE").write_text("free")
        config = slimdiff.CalibrationConfig(num_inference_steps=2)
        slimdiff.calibrate(self.pipe, ["a ring", "a star"], config, checkpoint=self.statistics)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("recorded"))


def test_the_command_gives_what_memory_gives(recorded: Recorded, tmp_path: Path) -> None:
    arguments = ("--low-memory", "--statistics", recorded.statistics, "--params", "0.85")
    done = shell("compress", recorded.dense, *arguments, "-o", tmp_path / "slim")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "slimdiff, uniform, --params 0.85" in told and "seconds to rewrite" in told
    pipe = tiny_pipeline()
    statistics = slimdiff.Statistics.load(recorded.statistics)
    budget = slimdiff.Budget(params=0.85)
    plan = slimdiff.allocate(pipe.unet, statistics, budget, allocation="uniform")
    slimdiff.rewrite(pipe.unet, statistics, plan)
    loaded = slimdiff.load_pipeline(tmp_path / "slim")
    assert loaded.unet.slim_record.plan.entries == plan.entries
    assert loaded.unet.slim_record.plan.figures["macs"] == plan.figures["macs"]
    card = (tmp_path / "slim" / "README.md").read_text()
    assert (tmp_path / "slim" / "LICENSE").read_text() == "free"
    assert f"to {plan.figures['params']:,}" in card and 'load_pipeline("slim")' in card
    for key, tensor in pipe.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[key], tensor), key


def test_statistics_of_other_weights_are_refused(recorded: Recorded, tmp_path: Path) -> None:
    other = tiny_pipeline()
    with torch.no_grad():
        other.unet.conv_out.weight += 1e-3
    other.save_pretrained(tmp_path / "other")
    budget, out = slimdiff.Budget(params=0.85), tmp_path / "slim"
    with pytest.raises(SlimdiffError, match="statistics are of another model: weights of unet"):
        compress_folder(tmp_path / "other", out, recorded.statistics, budget)
    assert not out.exists()
    other.unet.half().save_pretrained(tmp_path / "other" / "unet")
    compress_folder(tmp_path / "other", out, recorded.statistics, budget)


def test_a_plan_may_come_from_elsewhere(recorded: Recorded, tmp_path: Path) -> None:
    statistics = slimdiff.Statistics.load(recorded.statistics)
    plan = slimdiff.allocate(recorded.pipe.unet, statistics, slimdiff.Budget(remove="5K"))
    found = compress_folder(recorded.dense, tmp_path / "slim", recorded.statistics, plan=plan)
    assert found.entries == plan.entries
    assert found.figures["params"] == plan.figures["params"]


def test_memory_counts_with_the_dtype_on_disk(recorded: Recorded, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.unet.half()
    pipe.save_pretrained(tmp_path / "half")
    dense = sum(p.numel() for p in pipe.unet.parameters())
    budget = slimdiff.Budget(memory=str(int(dense * 2 * 0.9)))
    plan = compress_folder(tmp_path / "half", tmp_path / "slim", recorded.statistics, budget)
    assert 0.85 * dense < plan.figures["params"] <= 0.9 * dense


def test_what_needs_forward_passes_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    def tried(**how: Any) -> None:
        compress_folder(recorded.dense, tmp_path / "slim", recorded.statistics, **how)

    with pytest.raises(SlimdiffError, match="neither time nor error is measured"):
        tried(budget=slimdiff.Budget(speedup=1.5))
    with pytest.raises(SlimdiffError, match="neither time nor error is measured"):
        tried(budget=slimdiff.Budget(quality=1e-3))
    with pytest.raises(SlimdiffError, match="allocation probed needs the denoiser in memory"):
        tried(budget=slimdiff.Budget(params=0.9), allocation="probed")
    with pytest.raises(SlimdiffError, match="either a budget or a plan"):
        tried()
    done = shell("compress", recorded.dense, "--low-memory", "-o", tmp_path / "slim")
    assert done.returncode == 2 and "name --statistics" in done.stderr
    assert not list(tmp_path.iterdir())
