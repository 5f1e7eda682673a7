"""Digest of a model: what a calibration depends on, so that nothing of another is reused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from slimdiff.checksums import digests, hashed, tensors_digest, weights_digest
from slimdiff.denoiser import ENCODERS, component_of, settings
from slimdiff.errors import SlimdiffError

UNSEEN = ("vae", "vqvae", "movq", "vqgan", "safety_checker", "watermark", "watermarker")
"""Components that run after the last call of the denoiser, or not at all."""

VOLATILE = ("dtype", "torch_dtype", "transformers_version", "architectures", "slimdiff")
"""Settings that say nothing about what a model computes, or (slimdiff) are compared elsewhere."""

IN_PASSING = ("training", "gradient_checkpointing", "name_or_path")
"""Attributes of modules that change without any effect on what is recorded."""


def model_digest(pipe: Any, component: str | None = None) -> dict[str, Any]:
    """What the inputs of a pipeline's denoiser, or of one of its text encoders, depend on, as JSON.

    Args:
        pipe: a diffusers pipeline.
        component: a text encoder, which depends on its own weights and the tokenizers alone.

    Returns:
        `component`; `parameters`: `digests` of its own alone; `pipeline`: its class and settings;
        `scheduler`: class and config; `weights`: component -> digest; `settings`: component ->
        name -> digest; `tokenizers`: name -> digest.
    """
    name, module = component_of(pipe, component)
    parts = dict(getattr(pipe, "components", {}))
    used = {name: module} if name in ENCODERS else _models(parts) | {name: module}
    scheduler = None if name in ENCODERS else getattr(pipe, "scheduler", None)
    return _as_json(
        {
            "component": name,
            "parameters": digests(dict(module.named_parameters())),
            "pipeline": {"class": type(pipe).__name__} | _pipeline_settings(pipe),
            "scheduler": {} if scheduler is None else _scheduler(scheduler),
            "weights": {own: weights_digest(model) for own, model in used.items()},
            "settings": {own: _settings(model) for own, model in used.items()},
            "tokenizers": {own: hashed(_tokens(p)) for own, p in parts.items() if _is_tokenizer(p)},
        }
    )


def differences(there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> list[str]:
    """What differs between two models, by their digests, in words; empty if they are the same.

    A setting that only one of them has does not count: another release of a library may know more.

    Args:
        there: of what was kept; None if that does not say.
        here: of the model at hand.
    """
    if there is None:
        return ["it was not noted which model they are of"]
    found = []
    if there["component"] != here["component"]:
        found.append(f"component {there['component']}, not {here['component']}")
    for what, told in (
        ("pipeline", "the pipeline differs"),
        ("scheduler", "the scheduler differs"),
    ):
        if changed := _changed(there[what], here[what]):
            found.append(f"{told}: {', '.join(changed)}")
    found += [f"weights of {name} differ" for name in _unequal(there["weights"], here["weights"])]
    for name, known in here["settings"].items():
        if changed := _unequal_in_both(there["settings"].get(name, {}), known):
            found.append(f"settings of {name} differ: {', '.join(changed)}")
    return found + [f"{name} differs" for name in _unequal(there["tokenizers"], here["tokenizers"])]


def refuse_other_weights(sources: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to add up what was recorded of different weights of one class, in one dtype.

    Args:
        sources: of statistics; those that do not note their model count as of any.

    Raises:
        SlimdiffError: names the component.
    """
    models = [model for source in sources for model in _models_of(source)]
    for model in models[1:]:
        if _are_others(model["parameters"], models[0]["parameters"]):
            raise SlimdiffError(
                f"statistics of two models do not add up: weights of {model['component']} differ; "
                f"merge only what was recorded of the same weights"
            )


def refuse_other_model(source: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
    """Refuse to use what was calibrated with other weights, of the same dtypes.

    Args:
        source: of statistics; those that do not note their model count as of any.
        parameters: of the denoiser at hand, by name; each is looked up once.

    Raises:
        SlimdiffError: names the component.
    """
    models = _models_of(source)
    own = digests(parameters) if models else {}
    for model in models:
        if _are_others(model["parameters"], own):
            raise SlimdiffError(
                f"the statistics are of another model: weights of {model['component']} differ "
                f"(a merged LoRA, a later checkpoint?); calibrate again, on this one"
            )


def _are_others(there: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether parameters differ; of other dtypes, which are rounded in other ways, nobody knows."""
    return there["kinds"] == here["kinds"] and there["bits"] != here["bits"]


def model_differences(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of the model, other than the weights recorded, differs between some statistics: the
    names of its parts."""
    models = [model for source in sources for model in _models_of(source)]
    parts = [
        {what: model[what] for what in ("pipeline", "scheduler")}
        | {name: [model["weights"][name], model["settings"][name]] for name in model["weights"]}
        | model["tokenizers"]
        for model in models
    ]
    return sorted({name for part in parts for name in _unequal(parts[0], part)})


def _models_of(source: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The digests of the models that statistics are of; merged ones may hold merged ones."""
    if "merged" in source:
        return [model for part in source["merged"] for model in _models_of(part)]
    return [source["model"]] if "model" in source else []


def _models(parts: Mapping[str, Any]) -> dict[str, nn.Module]:
    found = {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}
    return {
        name: part
        for name, part in found.items()
        if isinstance(part, nn.Module) and name not in UNSEEN
    }


def _settings(model: nn.Module) -> dict[str, str]:
    """Digests of a model's class and config, and of the numbers that its modules hold: scales,
    heads, a LoRA's strength."""
    config = {k: v for k, v in settings(model).items() if k[0] != "_" and k not in VOLATILE}
    numbers = [
        [path, name, value]
        for path, module in model.named_modules()
        for name, value in sorted(vars(module).items())
        if name[0] != "_" and name not in IN_PASSING and "cache" not in name and _is_number(value)
    ]
    found = config | {"class": type(model).__name__, "numbers in its modules": numbers}
    return {name: hashed(value)[:12] for name, value in found.items()}


def _is_number(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(_is_number(own) for own in value.values())
    if isinstance(value, list | tuple):
        return all(_is_number(own) for own in value)
    return isinstance(value, bool | int | float)


def _pipeline_settings(pipe: Any) -> dict[str, Any]:
    """What a pipeline's own config says, without its components."""
    config = dict(getattr(pipe, "config", None) or {}) | {
        "vae_scale_factor": getattr(pipe, "vae_scale_factor", None)
    }
    return {
        name: value
        for name, value in config.items()
        if name[0] != "_" and name != "requires_safety_checker" and _is_number(value)
    }


def _scheduler(scheduler: Any) -> dict[str, Any]:
    """Class, config and, as they may be set by hand, the noise levels of a scheduler."""
    config = {k: v for k, v in dict(scheduler.config).items() if k[0] != "_"}
    levels = {name: getattr(scheduler, name, None) for name in ("betas", "alphas_cumprod")}
    tensors = {name: level for name, level in levels.items() if isinstance(level, Tensor)}
    shift = getattr(scheduler, "shift", None)
    more = {"shift": shift} if _is_number(shift) else {}
    more |= {"noise levels": tensors_digest(tensors)} if tensors else {}
    return {"class": type(scheduler).__name__} | config | more


def _is_tokenizer(part: Any) -> bool:
    return hasattr(part, "get_vocab")


def _tokens(tokenizer: Any) -> list[Any]:
    """What a tokenizer makes of a text; not how its last call padded and cut."""
    names = ("model_max_length", "padding_side", "chat_template")
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.loads(backend.to_str()) if hasattr(backend, "to_str") else {}
    rules = {name: rule for name, rule in whole.items() if name not in ("padding", "truncation")}
    own = [getattr(tokenizer, name, None) for name in names]
    special = getattr(tokenizer, "special_tokens_map", None)
    return [type(tokenizer).__name__, own, special, rules or tokenizer.get_vocab()]


def _unequal(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [name for name in {**there, **here} if there.get(name) != here.get(name)]


def _unequal_in_both(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [name for name in _unequal(there, here) if name in there and name in here]


def _changed(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Settings that differ, with both values; of two classes, the classes alone."""
    other = there.get("class") != here.get("class")
    names = ["class"] if other else _unequal_in_both(there, here)
    return [
        name
        if name == "noise levels"
        else f"{'' if name == 'class' else f'{name} '}{there.get(name)}, not {here.get(name)}"
        for name in names
    ]


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """As it is read again once it was written."""
    read: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return read
