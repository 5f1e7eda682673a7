"""What stands over a denoiser: refused by name at the start, or still there afterwards."""

from __future__ import annotations

import copy
import importlib
import pkgutil
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import slimdiff
from slimdiff import SlimdiffError
from slimdiff.wrapped import CACHES, OTHERS, refuse_offloaded, refuse_replaced
from tiny_models import TINY_MODELS
from tiny_pipeline import tiny_pipeline

CONFIG = slimdiff.CalibrationConfig(num_inference_steps=2, num_probes=4, batch_size=2)
PROMPTS = ["a red circle", "a blue square"]
BUDGET = slimdiff.Budget(params=0.8)
PLAIN = pytest.mark.filterwarnings("ignore")


def run(model: nn.Module, calls: list[dict[str, Any]]) -> slimdiff.Statistics:
    with slimdiff.record(model, num_probes=4) as statistics:
        for call in calls:
            model(**call)
    return statistics


def first_output(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


# --- recognised at the start ---------------------------------------------------------------


def _cache(name: str) -> Any:
    import diffusers.hooks as hooks

    broadcast = {
        f"{kind}_attention_{what}": value
        for kind in ("spatial", "cross")
        for what, value in {
            "block_skip_range": 2,
            "timestep_skip_range": (-1, 2000),
            "block_identifiers": ("blocks", "transformer_blocks"),
        }.items()
    }
    faster = {key: value for key, value in broadcast.items() if key.startswith("spatial")}
    return {
        "a first-block cache": lambda: hooks.FirstBlockCacheConfig(threshold=0.2),
        "pyramid attention broadcast": lambda: hooks.PyramidAttentionBroadcastConfig(
            **broadcast, current_timestep_callback=lambda: 500
        ),
        "FasterCache": lambda: hooks.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_block_identifiers=faster["spatial_attention_block_identifiers"],
            current_timestep_callback=lambda: 500,
        ),
        "MagCache": lambda: hooks.MagCacheConfig(num_inference_steps=4, calibrate=True),
        "TaylorSeer": lambda: hooks.TaylorSeerCacheConfig(),
    }[name]()


@PLAIN
@pytest.mark.parametrize(
    "name",
    [
        "a first-block cache",
        "pyramid attention broadcast",
        "FasterCache",
        "MagCache",
        "TaylorSeer",
    ],
)
def test_caches_of_diffusers_are_refused_by_name_until_they_are_disabled(name: str) -> None:
    model, calls = TINY_MODELS["flux"]()
    statistics = run(model, calls)
    plan = slimdiff.allocate(model, statistics, BUDGET)
    model.enable_cache(_cache(name))
    for use in (
        lambda: run(model, calls),
        lambda: slimdiff.allocate(model, statistics, BUDGET),
        lambda: slimdiff.rewrite(model, statistics, plan),
    ):
        with pytest.raises(SlimdiffError, match=rf"{name}.*disable_cache\(\)"):
            use()
    model.disable_cache()
    plain = copy.deepcopy(model)
    slimdiff.rewrite(model, statistics, plan)
    other, _ = TINY_MODELS["flux"]()
    slimdiff.rewrite(other, statistics, plan)
    assert not torch.equal(first_output(model, calls[0]), first_output(plain, calls[0]))
    assert torch.equal(first_output(model, calls[0]), first_output(other, calls[0]))


def test_a_cache_hook_without_a_config_says_how_to_remove_it() -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    model, calls = TINY_MODELS["flux"]()
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(SlimdiffError, match=r'remove_hook\("fbc_leader_block_hook"'):
        run(model, calls)


def _hook_names() -> Iterator[str]:
    import diffusers.hooks as hooks

    for info in pkgutil.iter_modules(hooks.__path__):
        module = importlib.import_module(f"{hooks.__name__}.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, str) and name.startswith("_") and "HOOK" in name:
                yield value


def test_every_hook_of_this_diffusers_is_known() -> None:
    harmless = {"peft_autocast_disable", "layer_execution_tracker"}
    starts = (*CACHES, *OTHERS)
    strange = {n for n in _hook_names() if not n.startswith(starts)} - harmless
    assert not strange


@PLAIN
def test_freeu_is_refused_until_it_is_disabled() -> None:
    model, calls = TINY_MODELS["sd1"]()
    statistics = run(model, calls)
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    for use in (
        lambda: run(model, calls),
        lambda: slimdiff.allocate(model, statistics, BUDGET),
    ):
        with pytest.raises(SlimdiffError, match=r"up_blocks\.0: FreeU.*disable_freeu\(\)"):
            use()
    model.disable_freeu()
    run(model, calls)


def test_layerwise_casting_is_refused() -> None:
    model, calls = TINY_MODELS["sd3"]()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(SlimdiffError, match="layerwise casting.*load the model again"):
        run(model, calls)


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        ("enable_model_cpu_offload", {"device": "cpu"}, r"CpuOffload.*remove_all_hooks\(\)"),
        ("enable_sequential_cpu_offload", {"device": "cpu"}, r"single layers.*remove_all_hooks"),
        (
            "enable_group_offload",
            {
                "onload_device": torch.device("cpu"),
                "offload_device": torch.device("cpu"),
                "offload_type": "leaf_level",
            },
            "group offloading.*load the pipeline again",
        ),
    ],
)
def test_offloading_is_refused_by_name(method: str, more: dict[str, Any], says: str) -> None:
    pipe = tiny_pipeline()
    getattr(pipe, method)(**more)
    with pytest.raises(SlimdiffError, match=says):
        slimdiff.compress(pipe, PROMPTS, BUDGET, config=CONFIG)


@PLAIN
def test_a_model_that_moves_as_a_whole_can_be_recorded_and_slimmed_when_it_stays() -> None:
    pipe, other = tiny_pipeline(), tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    moved = slimdiff.calibrate(pipe, PROMPTS, CONFIG)
    still = slimdiff.calibrate(other, PROMPTS, CONFIG)
    assert all(torch.equal(moved.sums[name], still.sums[name]) for name in still.sums)
    pipe.remove_all_hooks()
    assert "forward" in vars(pipe.unet), "what accelerate leaves: the class's own, bound"
    slimdiff.compress(pipe, PROMPTS, BUDGET, config=CONFIG)
    slimdiff.compress(other, PROMPTS, BUDGET, config=CONFIG)
    assert "forward" not in vars(pipe.unet)
    for name, parameter in other.unet.named_parameters():
        assert torch.equal(parameter, pipe.unet.get_parameter(name))


def _forward_of(package: str, module: nn.Module) -> Callable[..., Any]:
    """A forward as a package's own file would define it, around the module's own."""
    scope: dict[str, Any] = {"__name__": f"{package}.extension", "own": module.forward}
    exec("def wrapped_forward(*args, **kwargs):\n    return own(*args, **kwargs)", scope)
    return scope["wrapped_forward"]


@pytest.mark.parametrize(
    ("package", "fix"),
    [("DeepCache", r"helper\.disable\(\)"), ("cache_dit", r"cache_dit\.disable_cache\(pipe\)")],
)
def test_forwards_of_caching_packages_are_refused_by_name(package: str, fix: str) -> None:
    model, calls = TINY_MODELS["sd1"]()
    block = model.down_blocks[0].resnets[0]
    block.forward = _forward_of(package, block)
    for denoiser in (model, copy.deepcopy(model)):
        with pytest.raises(SlimdiffError, match=rf"down_blocks\.0\.resnets\.0: .*{fix}"):
            run(denoiser, calls)


def test_classes_of_token_merging_are_refused_by_name() -> None:
    model, calls = TINY_MODELS["sd1"]()
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    own = type(block)
    block.__class__ = type("ToMeBlock", (own,), {"__module__": "tomesd.patch", "_parent": own})
    with pytest.raises(SlimdiffError, match=r"token merging.*tomesd\.remove_patch\(pipe\)"):
        run(model, calls)
    block.__class__ = own
    run(model, calls)


def test_teacache_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script sets attributes of the class, and puts a forward there."""
    model, calls = TINY_MODELS["flux"]()
    monkeypatch.setattr(type(model), "enable_teacache", True, raising=False)
    with pytest.raises(SlimdiffError, match="TeaCache.*enable_teacache"):
        run(model, calls)
    monkeypatch.setattr(type(model), "enable_teacache", False)
    run(model, calls)


def test_a_hook_that_remembers_calls_is_refused_whatever_its_name() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Own(ModelHook):
        _is_stateful = True

        def reset_state(self, module: nn.Module) -> nn.Module:
            return module

    model, calls = TINY_MODELS["wan"]()
    registry = HookRegistry.check_if_exists_or_initialize(model.blocks[0])
    registry.register_hook(Own(), "mine")
    with pytest.raises(SlimdiffError, match=r'blocks\.0: a hook that remembers.*"mine"'):
        run(model, calls)
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("mine", recurse=True)
    run(model, calls)


def test_a_cache_that_nobody_knows_is_found_by_the_layers_that_it_skips() -> None:
    """As TeaCache does: the class's forward is another, and reuses what the last call put out."""
    model, calls = TINY_MODELS["sd3"]()
    block = model.transformer_blocks[1]
    kept: list[Any] = []
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(kept) % 2 == 0:
            kept.append(own(*args, **kwargs))
        else:
            kept.append(kept[-1])
        return kept[-1]

    block.forward = forward
    with pytest.raises(SlimdiffError, match=r"transformer_blocks\.1.* not in call 2.*caches"):
        run(model, calls)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_calls_that_say_which_layers_to_skip_are_no_cache() -> None:
    model, calls = TINY_MODELS["sd3"]()
    run(model, [calls[0], calls[1] | {"skip_layers": [1]}, calls[2]])


# --- nothing that was there before is gone ---------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        hooks = {
            name: [id(hook) for hook in value.values() if "transformers" not in str(hook)]
            for name, value in vars(module).items()
            if name.endswith("_hooks") and isinstance(value, dict)
        }
        own = {key: id(value) for key, value in vars(module).items() if callable(value)}
        keys = set(vars(module)) - {"_diffusers_hook", "_output_capturing_hooks_installed"}
        processor = getattr(module, "processor", None)
        found[path] = (hooks, own, keys, type(module), module.training, processor)
    for name, parameter in model.named_parameters():
        found[f"{name}:"] = (parameter.dtype, parameter.requires_grad, parameter._version)
    return found


def unlike(model: nn.Module) -> nn.Module:
    """With all that a person may have left on a model."""
    model.train()
    blocks = [m for m in model.modules() if type(m).__name__.endswith(("Block", "Layer"))]
    for block in blocks[:2]:
        own = block.forward
        block.forward = lambda *args, _own=own, **kwargs: _own(*args, **kwargs)
        block.register_forward_hook(lambda *_: None)
        block.register_full_backward_hook(lambda *_: None)
    return model


@PLAIN
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_recording_leaves_everything_as_it_was(name: str) -> None:
    model, calls = TINY_MODELS[name]()
    unlike(model)
    model(**calls[0])  # transformers hooks a model when it first runs
    before = state_of(model)
    run(model, calls)
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="stop"), slimdiff.record(model):
        model(**calls[0])
        raise RuntimeError("stop")
    assert state_of(model) == before


def test_groups_of_another_model_are_refused_before_anything_is_hooked() -> None:
    model, _ = TINY_MODELS["sd3"]()
    before = state_of(model)
    others = slimdiff.groups_of(TINY_MODELS["sd1"]()[0])
    with (
        pytest.raises(SlimdiffError, match="no such module"),
        slimdiff.record(model, groups=others),
    ):
        pass
    assert state_of(model) == before


@PLAIN
@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "wan"])
def test_allocating_leaves_everything_as_it_was(name: str) -> None:
    model, calls = TINY_MODELS[name]()
    statistics = run(model, calls)
    unlike(model)
    before = state_of(model)
    slimdiff.allocate(model, statistics, BUDGET)
    assert state_of(model) == before

    def stop(stage: str, done: int, _all: int) -> None:
        if done == 3:
            raise RuntimeError(stage)

    with pytest.raises(RuntimeError, match="probe"):
        slimdiff.allocate(model, statistics, BUDGET, progress=stop)
    assert state_of(model) == before


@PLAIN
def test_a_forward_that_takes_anything_is_recorded_by_the_names_of_the_class() -> None:
    pipe, other = tiny_pipeline(), tiny_pipeline()
    for module in (pipe.unet, *(m for m in pipe.unet.modules() if hasattr(m, "to_q"))):
        own = module.forward
        module.forward = lambda *args, _own=own, **kwargs: _own(*args, **kwargs)
    log = replace(CONFIG, timestep_weights="log")
    one, two = (slimdiff.calibrate(p, PROMPTS, log) for p in (pipe, other))
    assert all(torch.equal(one.sums[name], two.sums[name]) for name in two.sums)
    assert one.probes.rows.keys() == two.probes.rows.keys()
    assert slimdiff.allocate(pipe.unet, one, BUDGET) == slimdiff.allocate(other.unet, two, BUDGET)


@PLAIN
def test_a_compression_that_stops_leaves_everything_as_it_was() -> None:
    pipe = tiny_pipeline()
    pipe(PROMPTS[0], num_inference_steps=1, output_type="latent")
    before = {name: state_of(getattr(pipe, name)) for name in ("unet", "text_encoder", "vae")}
    for stage in ("calibrate", "probe"):

        def stop(at: str, done: int, _all: int, stage: str = stage) -> None:
            if at == stage:
                raise RuntimeError(stage)

        with pytest.raises(RuntimeError, match=stage):
            slimdiff.compress(pipe, PROMPTS, BUDGET, config=CONFIG, progress=stop)
        assert before == {name: state_of(getattr(pipe, name)) for name in before}


@PLAIN
def test_a_compression_leaves_nothing_behind() -> None:
    """The denoiser is slim; everything else is as it was, in every component."""
    pipe = tiny_pipeline()
    pipe.unet.train()
    pipe(PROMPTS[0], num_inference_steps=1, output_type="latent")
    pipe.scheduler.set_timesteps(2)
    before = {name: state_of(getattr(pipe, name)) for name in ("text_encoder", "vae")}
    scheduler = dict(pipe.scheduler.config)
    dtypes = {parameter.dtype for parameter in pipe.unet.parameters()}
    slimdiff.compress(pipe, PROMPTS, slimdiff.Budget(params=0.5), config=CONFIG)
    assert before == {name: state_of(getattr(pipe, name)) for name in before}
    assert dict(pipe.scheduler.config) == scheduler
    assert dtypes == {parameter.dtype for parameter in pipe.unet.parameters()}
    for module in pipe.unet.modules():
        assert module.training and "forward" not in vars(module)
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@PLAIN
def test_hooks_that_move_nothing_stay_and_run_the_slim_layers() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe, other = tiny_pipeline(), tiny_pipeline()
    for module in pipe.unet.modules():
        add_hook_to_module(module, ModelHook())
    budget = slimdiff.Budget(params=0.4)
    plans = [slimdiff.compress(p, PROMPTS, budget, config=CONFIG) for p in (pipe, other)]
    assert plans[0].entries == plans[1].entries
    assert "_hf_hook" in vars(pipe.unet)
    call = {
        "sample": torch.randn(1, *[4, 8, 8]),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 7, pipe.unet.config.cross_attention_dim),
    }
    assert torch.equal(first_output(pipe.unet, call), first_output(other.unet, call))


@PLAIN
def test_a_replaced_forward_is_refused_where_slimming_would_be_hidden_by_it() -> None:
    model, calls = TINY_MODELS["sd1"]()
    statistics = run(model, calls)
    plan = slimdiff.allocate(model, statistics, slimdiff.Budget(params=0.35))
    gone = next(name for name, entry in plan.entries.items() if not entry.width)
    layer = model.get_submodule(gone.removesuffix(".qk").removesuffix(".vo"))
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before = state_of(model)
    with pytest.raises(SlimdiffError, match="forward was replaced by .*test_wrapped"):
        slimdiff.rewrite(model, statistics, plan)
    with pytest.raises(SlimdiffError, match="a copy would run the layers of the original"):
        refuse_replaced(model)
    assert state_of(model) == before
    del layer.forward
    refuse_replaced(model)
    slimdiff.rewrite(model, statistics, plan)


def test_what_is_no_memory_is_not_refused() -> None:
    """A registry without hooks, FreeU that was disabled, a forward of one's own, a compiled one."""
    from diffusers.hooks import HookRegistry

    model, _ = TINY_MODELS["sd1"]()
    HookRegistry.check_if_exists_or_initialize(model)
    model.disable_freeu()
    model.down_blocks[0].forward = types.MethodType(type(model.down_blocks[0]).forward, model)
    block = model.down_blocks[1]
    block.forward = torch.compile(block.forward, backend="eager")
    refuse_offloaded(model)
