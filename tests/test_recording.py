"""What recording adds to a call: operations dispatched and waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slimdiff.record import recording
from tiny_models import TINY_MODELS

WAITS = ("aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.item.default")


class Counted(TorchDispatchMode):
    """Counts operations, views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.operations[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        return sum(self.operations[name] for name in WAITS)


def counted(model: Any, call: dict[str, Any]) -> Counted:
    with torch.inference_mode(), Counted() as found:
        model(**call)
    return found


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "pixart"])
def test_a_recorded_call_adds_few_operations_and_waits_once(name: str) -> None:
    model, inputs = TINY_MODELS[name]()
    plain = counted(model, inputs[0])
    with recording(model, None, None, 0, 1, 64, torch.float64) as recorder:
        recorder.reservoir = None
        model(**inputs[0])
        recorded = counted(model, inputs[1])
    added = recorded.operations.total() - plain.operations.total()
    assert added <= 9 * len(recorder.statistics.sums)
    assert recorded.waits - plain.waits <= 1
