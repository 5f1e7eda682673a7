"""A pytest plugin that notes outcomes, and gives diffusers' test classes slim models.

Their test classes say which model is tested by `model_class`, `get_init_dict` and
`get_dummy_inputs`, those of pipelines by `get_dummy_components`. Slim, the first is the slim class,
whose widths are those that slimdiff found for the dense model on these inputs, and pipelines get
their denoiser slimmed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import slimdiff
from peer_outcomes import Outcomes, worst
from peer_stand_ins import stand_in
from slimdiff import costs
from slimdiff.slim_denoiser import slim_class

ON_A_CPU_TOO = (
    "test requires a hardware accelerator",
    "test requires accelerator with training support",
)
"""Reasons for skipping of tests that a CPU can run as well."""

OFFLOADING = ("test_cpu_offload", "test_disk_offload", "test_group_offloading")
"""How tests begin that a CPU cannot run."""

OFFLINE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "is offline", "offline mode")
"""What failures say of tests that fetch something."""

MADE: list[str] = []
"""Classes of the slim models that were made."""

DENOISERS = ("unet", "transformer", "controlnet")


def slimmed(model: nn.Module, calls: Sequence[dict[str, Any]]) -> nn.Module:
    """A slim copy: half of what can shrink is gone, measured on these calls."""
    model = copy.deepcopy(model).eval()
    with slimdiff.record(model) as statistics:
        for call in calls:
            model(**call)
    return _halved(model, statistics)


def _halved(model: nn.Module, statistics: slimdiff.Statistics) -> nn.Module:
    groups = slimdiff.groups_of(model)
    found = costs.measure(model, groups, statistics.probes.batches(1)[0])
    shrinkable = sum(found.groups[group.name].of("params", group.inner) for group in groups)
    budget = slimdiff.Budget(remove=shrinkable // 2)
    plan = slimdiff.allocate(model, statistics, budget)
    MADE.append(type(slimdiff.rewrite(model, statistics, plan)).__name__)
    return model


class Suite:
    """The plugin of one run, dense or slim."""

    def __init__(self, slim: bool) -> None:
        self.slim = slim
        self.outcomes: Outcomes = {}
        self.messages: dict[str, str] = {}
        self.cls: Any = None
        self.bases: set[Any] = set()
        self.made: dict[str, dict[str, Any]] = {}
        self.patch = pytest.MonkeyPatch()
        stand_in(self.patch)
        if slim:
            _trust_code(self.patch)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Take off the marks of accelerators; of a slim run, exchange the models."""
        gc.freeze()  # tests collect garbage again and again: not what was imported
        for item in items:
            if item.name.startswith(OFFLOADING):
                item.add_marker(pytest.mark.skip("needs an accelerator"))
            for node in item.listchain():
                node.own_markers = [mark for mark in node.own_markers if not _accelerator(mark)]
        if self.slim:
            for cls in {item.cls for item in items if item.cls is not None}:
                self._make_slim(cls)

    def pytest_collectreport(self, report: Any) -> None:
        """Say why a file cannot be collected."""
        if report.failed:
            print(report.longreprtext)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: Any) -> None:
        """Note the test class, whose inputs find the widths."""
        self.cls = item.cls

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Generator[None, Any, Any]:
        """A failure for want of a network is a skip."""
        report = yield
        if report.failed and any(word in report.longreprtext for word in OFFLINE):
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, "Skipped: offline")
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the outcome, and what a failure says."""
        name = report.nodeid
        self.outcomes[name] = worst(self.outcomes.get(name), report.outcome)
        if report.failed:
            self.messages[name] = report.longreprtext

    def said(self) -> dict[str, str]:
        """The first line of what each failure says."""
        lines = {name: _raised(message) for name, message in self.messages.items()}
        return {name: line[:300] for name, line in lines.items()}

    def pytest_unconfigure(self) -> None:
        """Put the test classes back."""
        self.patch.undo()

    def _make_slim(self, cls: Any) -> None:
        if hasattr(cls, "get_dummy_components"):
            self.patch.setattr(cls, "get_dummy_components", _slim_components(cls))
        elif hasattr(cls, "get_init_dict"):
            base = cls().model_class
            slim: Any = slim_class(base)
            if base not in self.bases:
                self.patch.setattr(slim, "__init__", _with_widths(slim.__init__, base, self))
                self.bases.add(base)
            self.patch.setattr(cls, "model_class", property(lambda self: slim))

    def widths(self, base: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """The slim config of a model with these arguments; the same for equal ones.

        Tests change arguments so that inputs are missing: then it is that of their own arguments.
        """
        key = f"{base.__name__} {sorted(arguments.items(), key=str)}"
        if key not in self.made:
            test = self.cls()
            found = _widths(base, arguments, test) or _widths(base, test.get_init_dict(), test)
            if found is None:
                raise slimdiff.SlimdiffError(f"{base.__name__}: its test's inputs do not fit it")
            self.made[key] = found
        return copy.deepcopy(self.made[key])


def _raised(message: str) -> str:
    """The error in a traceback, which pytest marks with an E."""
    lines = [line[1:].strip() for line in message.splitlines() if line.startswith("E ")]
    return lines[0] if lines else message.strip()


def _accelerator(mark: Any) -> bool:
    return mark.name == "skipif" and mark.kwargs.get("reason") in ON_A_CPU_TOO


def _trust_code(patch: pytest.MonkeyPatch) -> None:
    """Have pipelines load as slim ones do: with `trust_remote_code=True`."""
    from diffusers import DiffusionPipeline

    own = DiffusionPipeline.from_pretrained.__func__

    @functools.wraps(own)
    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        return own(cls, *args, **{"trust_remote_code": True, **options})

    patch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))


def _with_widths(own: Any, base: Any, suite: Suite) -> Any:
    """The slim class's `__init__`; without widths, those that slimdiff finds for the arguments."""

    @functools.wraps(own)
    def __init__(self: Any, *args: Any, slimdiff: Any = None, **arguments: Any) -> None:
        own(self, *args, slimdiff=slimdiff or suite.widths(base, arguments), **arguments)

    return __init__


def _widths(base: Any, arguments: dict[str, Any], test: Any) -> dict[str, Any] | None:
    """The slim config for these arguments on the test's inputs, or on random ones that fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = base(**arguments)
        own = getattr(test, "calls", None) or [test.get_dummy_inputs()]
        for calls in (lambda: own, lambda: [costs.example_inputs(model)]):
            with contextlib.suppress(RuntimeError, ValueError, TypeError):
                return dict(slimmed(model, [_usable(call) for call in calls()]).config["slimdiff"])
    return None


def _usable(value: Any) -> Any:
    """The same in float32, with random values for floating tensors that hold nothing, and ones."""
    if isinstance(value, dict):
        return {key: _usable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_usable(part) for part in value)
    if isinstance(value, torch.Tensor) and value.is_meta:
        value = torch.ones_like(value, device="cpu")
        return torch.randn_like(value) if value.is_floating_point() else value
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    return value


def _slim_components(cls: Any) -> Any:
    """`get_dummy_components` with the denoiser's slim form, which is made once for each options."""
    own, made = cls.get_dummy_components, {}

    @functools.wraps(own)
    def get_dummy_components(self: Any, *args: Any, **options: Any) -> dict[str, Any]:
        components, key = own(self, *args, **options), f"{args} {options}"
        if key not in made:
            made[key] = _slim_denoisers(self, own(self, *args, **options))
        return {**components, **copy.deepcopy(made[key])}

    return get_dummy_components


def _slim_denoisers(test: Any, components: dict[str, Any]) -> dict[str, nn.Module]:
    """The slim form of the denoiser of a test class's pipeline."""
    name = next(name for name in DENOISERS if components.get(name) is not None)
    pipe = test.pipeline_class(**components)
    pipe.set_progress_bar_config(disable=True)
    model = getattr(pipe, name).eval()
    device = ("cpu",) if "device" in inspect.signature(test.get_dummy_inputs).parameters else ()
    with slimdiff.record(model) as statistics:
        pipe(**test.get_dummy_inputs(*device))
    return {name: _halved(model, statistics)}
