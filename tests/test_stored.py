"""Dtypes on disk: every tensor keeps its own, and budgets of memory count with it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import slimdiff
from slimdiff import costs as costs_
from slimdiff.budget import Saving
from slimdiff.errors import SlimdiffError
from slimdiff.stored import (
    cast_,
    refuse_other_weights,
    round_,
    saved_dtypes,
    stored_dtypes,
    weight_files,
)
from test_cli import shell
from test_contract import CASES, Case, case
from tiny_models import TINY_MODELS
from tiny_pipeline import tiny_pipeline

__all__ = ["case"]

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def mixed(model: nn.Module) -> dict[str, torch.dtype]:
    """A dtype for every tensor, in turn."""
    names = [name for name, t in model.state_dict().items() if t.is_floating_point()]
    return {name: KINDS[place % len(KINDS)] for place, name in enumerate(names)}


def bytes_of(model: nn.Module) -> int:
    """Of all that a file of the model holds."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def on_disk(folder: Path) -> dict[str, torch.dtype]:
    """Read tensor by tensor, with nothing of slimdiff."""
    found = {}
    for path in [p for p in folder.glob("*.safetensors") if "maps" not in p.name]:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).dtype for name in file.keys()}
    return found


@CASES
def test_bytes_that_a_plan_counts_are_those_that_are_saved(case: Case) -> None:
    model, dtypes = case.copy(), mixed(case.model)
    saving = Saving(dtypes)
    before = costs_.measure(model, case.groups, case.inputs[0], (), saving)
    budget = slimdiff.Budget(memory=int(0.8 * before.bytes))
    # Of the probed allocation's plans some remove whole layers, whose constants are saved too.
    how = {} if type(case.model).__name__ == "UNet2DConditionModel" else {"allocation": "uniform"}
    plan = slimdiff.allocate(model, case.statistics, budget, saving=saving, **how)
    slimdiff.rewrite(model, case.statistics, plan)
    cast_(model, saved_dtypes(model, dtypes))
    assert bytes_of(model) == plan.figures["bytes"] <= 0.8 * before.bytes
    cast_(case.copy(), dtypes)
    assert plan.figures["bytes_dense"] == before.bytes == bytes_of(cast(case.copy(), dtypes))


def cast(model: nn.Module, dtypes: dict[str, torch.dtype]) -> nn.Module:
    cast_(model, dtypes)
    return model


def test_bytes_are_counted_in_a_model_s_own_dtypes(tmp_path: Path) -> None:
    """Wan keeps its tables and norms in float32, the first parameter among them."""
    import diffusers

    model, calls = TINY_MODELS["wan"]()
    model.save_pretrained(tmp_path)
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    assert next(model.blocks[0].attn1.to_q.parameters()).dtype == torch.bfloat16
    halves = [
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in call.items()} for call in calls
    ]
    with slimdiff.record(model) as statistics:
        for call in halves:
            model(**call)
    before = bytes_of(model)
    plan = slimdiff.allocate(model, statistics, slimdiff.Budget(memory=0.8), multiple=1)
    slimdiff.rewrite(model, statistics, plan)
    assert 0.76 * before < bytes_of(model) == plan.figures["bytes"] <= 0.8 * before


def test_every_shard_and_only_the_variant_is_looked_at(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    for place, kind in enumerate(KINDS[:3]):
        tensors = {names[place]: torch.zeros(2, dtype=kind)}
        save_file(
            tensors, tmp_path / f"diffusion_pytorch_model-{place + 1:05d}-of-00003.safetensors"
        )
    files = {
        name: f"diffusion_pytorch_model-{place + 1:05d}-of-00003.safetensors"
        for place, name in enumerate(names)
    }
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    halves = {name: torch.zeros(2, dtype=torch.float16) for name in names}
    save_file(halves, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    save_file({"a": torch.zeros(2, dtype=torch.float64)}, tmp_path / "slimdiff_maps.safetensors")
    assert stored_dtypes(tmp_path) == dict(zip(names, KINDS, strict=False))
    assert set(stored_dtypes(tmp_path, "fp16").values()) == {torch.float16}
    assert weight_files(tmp_path, "ema") == weight_files(tmp_path)
    assert weight_files(tmp_path / "nowhere") == {}


def test_what_is_made_anew_has_the_dtype_of_what_it_came_from() -> None:
    model = nn.Module()
    for name in ("to_out", "ff"):
        model.add_module(name, nn.Module())
    model.to_out.register_parameter("projection", nn.Parameter(torch.zeros(2)))
    model.ff.register_parameter("constant", nn.Parameter(torch.zeros(2)))
    model.register_parameter("renamed", nn.Parameter(torch.zeros(2)))
    stored = {
        "to_out.weight": torch.float32,
        "ff.net.0.bias": torch.float64,
        "ff.net.2.bias": torch.float16,
        "other": torch.bfloat16,
        "another": torch.bfloat16,
    }
    assert saved_dtypes(model, stored) == {
        "renamed": torch.bfloat16,
        "to_out.projection": torch.float32,
        "ff.constant": torch.float16,
    }


def test_rounding_is_what_saving_does_and_overflow_is_refused() -> None:
    model = nn.Linear(7, 5)
    dtypes = {"weight": torch.bfloat16}
    expected = model.weight.detach().bfloat16()
    round_(model, dtypes)
    assert model.weight.dtype == torch.float32 and torch.equal(model.weight.bfloat16(), expected)
    cast_(model, dtypes)
    assert torch.equal(model.weight, expected) and model.bias.dtype == torch.float32
    large = nn.Linear(1, 1)
    nn.init.constant_(large.weight, 1e5)
    with pytest.raises(SlimdiffError, match="weight: holds numbers up to 1.0e.05, beyond"):
        round_(large, {"weight": torch.float16})


def test_a_tensor_that_ran_in_fewer_bits_gets_back_what_it_was(tmp_path: Path) -> None:
    model = nn.Linear(7, 5)
    dense = {name: t.detach().clone() for name, t in model.state_dict().items()}
    save_file(dense, tmp_path / "model.safetensors")
    model.half()
    model.weight.data[0, 0] += 1
    cast_(model, stored_dtypes(tmp_path), weight_files(tmp_path))
    assert torch.equal(model.bias, dense["bias"])
    assert (
        model.weight.dtype == torch.float32
        and model.weight[0, 0] == 1 + dense["weight"][0, 0].half()
    )


def test_other_weights_than_the_model_s_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(7, 5)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    refuse_other_weights(model, tmp_path)
    model.bias.data[3] += 1e-6
    with pytest.raises(SlimdiffError, match="bias is not what was measured"):
        refuse_other_weights(model, tmp_path)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 folder whose norms are float32, in two shards."""
    folder: Path = tmp_path_factory.mktemp("half")
    pipe: Any = tiny_pipeline()
    for name, parameter in pipe.unet.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else torch.float16)
    pipe.text_encoder.to(torch.bfloat16)
    pipe.save_pretrained(folder / "dense")
    pipe.unet.save_pretrained(folder / "dense" / "unet", max_shard_size="400KB")
    (folder / "dense" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder


QUICK = ("--steps", "2", "--num-probes", "4", "--batch-size", "2", "--no-report")


def test_the_command_keeps_each_dtype_and_meets_a_budget_in_bytes(half: Path) -> None:
    dense, out = half / "dense", half / "slim"
    assert len(list((dense / "unet").glob("*.safetensors"))) == 2

    def size(folder: Path) -> int:
        files = [p for p in (folder / "unet").glob("*.safetensors") if "maps" not in p.name]
        return sum(path.stat().st_size for path in files)

    goal = int(0.8 * size(dense))
    how = ("--prompts", half / "prompts.txt", "--memory", goal, "--layers", "feed_forward,resnet")
    done = shell("compress", dense, *how, *QUICK, "-o", out)
    assert done.returncode == 0, done.stderr
    assert 0.95 * goal < size(out) <= 1.005 * goal
    before, after = on_disk(dense / "unet"), on_disk(out / "unet")
    assert Counter(before.values()).keys() == {torch.float16, torch.float32}
    assert {name: kind for name, kind in after.items() if name in before} == {
        name: before[name] for name in before if name in after
    }
    assert set(on_disk(out / "text_encoder").values()) == {torch.bfloat16}
