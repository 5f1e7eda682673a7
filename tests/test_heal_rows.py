"""Rows of dense calls: what is kept of them can be run and trained on again."""

from __future__ import annotations

import pytest
import torch

from slimdiff.healing.rows import Rows, recorded
from tiny_models import TINY_MODELS

DENOISERS = sorted(
    set(TINY_MODELS) - {"controlnet", "clip_text", "clip_text_projection", "t5", "t5_plain"}
)


@pytest.mark.parametrize("family", DENOISERS)
def test_rows_of_several_calls_run_together(family: str) -> None:
    """Each row gets what it got in its own call, timestep and positions too."""
    model, inputs = TINY_MODELS[family]()
    with torch.inference_mode(), recorded(model) as calls:
        for call in inputs[:2]:
            model(**call)
    rows = Rows(calls)
    assert len(rows) == 4 == sum(len(call.output) for call in calls)
    (arguments, target), *others = rows.batches([3, 0, 1], at_once=4, device="cpu")
    assert not others and len(target) == 3
    wanted = torch.stack([calls[1].output[1], calls[0].output[0], calls[0].output[1]])
    assert torch.equal(target, wanted)
    output = model(**arguments)[0]
    torch.testing.assert_close(output, target, rtol=1e-4, atol=1e-5)
    (output - 1).square().sum().backward()  # after a run without gradients
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients)
    assert any(bool(g.any()) for g in gradients)


def test_what_calls_share_is_kept_once() -> None:
    model, inputs = TINY_MODELS["sd1"]()
    later = {**inputs[0], "timestep": torch.tensor(3), "sample": inputs[1]["sample"]}
    with torch.inference_mode(), recorded(model) as calls:
        model(**inputs[0])
        model(**later)
    one, two = (Rows([call]).nbytes for call in calls)
    text = 4 * inputs[0]["encoder_hidden_states"].numel()
    assert Rows(calls).nbytes == one + two - text


def test_rows_that_differ_in_shape_come_apart() -> None:
    model, inputs = TINY_MODELS["sd1"]()
    wide = {**inputs[1], "sample": torch.randn(2, 4, 8, 16)}
    with torch.no_grad(), recorded(model) as calls:
        model(**inputs[0])
        model(**wide)
    batches = list(Rows(calls).batches(range(4), at_once=4, device="cpu"))
    assert [tuple(target.shape) for _, target in batches] == [(2, 4, 8, 8), (2, 4, 8, 16)]
    assert [len(t) for _, t in Rows(calls).batches(range(4), at_once=1, device="cpu")] == [1] * 4


def test_rows_are_drawn_without_repetition() -> None:
    model, inputs = TINY_MODELS["sd1"]()
    with torch.no_grad(), recorded(model) as calls:
        for call in inputs:
            model(**call)
    rows = Rows(calls)
    drawn = [rows.some(5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 5
    assert sorted(rows.some(99, torch.Generator().manual_seed(0))) == list(range(8))
