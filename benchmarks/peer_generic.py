"""diffusers' model tester mixins on the tiny models of tests/tiny_models.py, collected by pytest.

diffusers has test classes for one or two configs of a class; these are for the others.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from tests.models import testing_utils  # diffusers' own; peer_suite.py puts it on the path

from tiny_models import TINY_MODELS

MIXINS = (
    "ModelTesterMixin",
    "TrainingTesterMixin",
    "AttentionTesterMixin",
    "LayerwiseCastingTesterMixin",
    "LoraTesterMixin",
    "PyramidAttentionBroadcastTesterMixin",
    "FirstBlockCacheTesterMixin",
)
LEFT_OUT = ("plain_gelu", "clip_text", "clip_text_projection", "t5", "t5_plain")
"""Exchanged by hand, so that no config makes them; or no model of diffusers."""


@functools.cache
def _tiny(name: str) -> tuple[torch.nn.Module, list[dict[str, Any]], tuple[int, ...]]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model, calls = TINY_MODELS[name]()
        output = model(**calls[0], return_dict=False)[0]
    output = output[0] if isinstance(output, list | tuple) else output
    return model, calls, tuple(output.shape[1:])


class Tiny:
    """What the mixins ask of a test class, for the tiny model of this name."""

    name = ""

    @property
    def model_class(self) -> Any:
        """Of the tiny model."""
        return type(_tiny(self.name)[0])

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Without the batch."""
        return _tiny(self.name)[2]

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Inputs of several forwards."""
        return copy.deepcopy(_tiny(self.name)[1])

    def get_init_dict(self) -> dict[str, Any]:
        """Its config."""
        config: Any = _tiny(self.name)[0].config
        return {key: copy.deepcopy(value) for key, value in config.items() if key[0] != "_"}

    def get_dummy_inputs(self) -> dict[str, Any]:
        """Inputs of one forward."""
        return self.calls[0]


def _test_class(name: str, mixin: str) -> type:
    bases = (Tiny, getattr(testing_utils, mixin), testing_utils.BaseModelTesterConfig)
    return type(f"Test_{name}__{mixin}", bases, {"name": name, "__module__": __name__})


for _name in TINY_MODELS:
    for _mixin in MIXINS if _name not in LEFT_OUT else ():
        globals()[f"Test_{_name}__{_mixin}"] = _test_class(_name, _mixin)
