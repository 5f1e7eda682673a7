"""The whole evaluation of a slim pipeline against the dense one: fidelity, cost and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from slimdiff import accounting, costs
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.cost import measure_cost
from slimdiff.evaluate.features import ClipScore, Features
from slimdiff.evaluate.fidelity import Drawn, Judge, measure_fidelity
from slimdiff.evaluate.pictures import Picture, draw, fit_pairs, uncovered
from slimdiff.evaluate.sampling import first_call, one_row_of
from slimdiff.evaluate.settings import Settings
from slimdiff.evaluate.velocity import comparing, model_of
from slimdiff.families import groups_of
from slimdiff.layers import is_fused
from slimdiff.picture import base64_png
from slimdiff.results import Results, called, made_by

Progress = Callable[[str, int, int], None]


def evaluate(
    dense: Any,
    slim: Any,
    prompts: Sequence[str],
    settings: Settings | None = None,
    *,
    features: Features | None = None,
    clip: ClipScore | None = None,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> Results:
    """What was lost and what was gained, as results (see `slimdiff.results`).

    Args:
        dense, slim: pipelines of one kind, dtype and device; neither is changed.
        prompts: held-out prompts, not those of calibration.
        settings: sampling, seeds and how often to time.
        features: for the distances between the two sets of images; the VAE's encoder by default.
        clip: for the CLIP score; left out by default.
        judge: (images, prompts) -> scene accuracy, for pipelines whose pictures can be judged.
        progress: called with (stage, done, in all).

    Raises:
        SlimdiffError: no prompt, or pipelines that cannot be compared.
    """
    settings = settings or Settings()
    if not prompts:
        raise SlimdiffError("no prompts to evaluate on; give at least one, not of calibration")
    drawn = _draw(dense, slim, prompts, settings, progress)
    call = first_call(dense, prompts[0], **settings.sampling)
    one_row = one_row_of(call)
    given = {"features": features, "clip": clip, "judge": judge}
    whole = {
        "made": made_by(_call(settings, given), **_how(dense, prompts, settings)),
        "model": _names(dense, slim),
        "fidelity": measure_fidelity(
            drawn, _default_features(dense) if features is None else features, clip, judge
        ),
        "cost": measure_cost(dense, slim, call, one_row, prompts[0], settings, progress),
        "images": _shown(drawn, settings),
    }
    return whole | _plan(slim) | _accounts(model_of(dense), model_of(slim), one_row)


def _draw(
    dense: Any, slim: Any, prompts: Sequence[str], settings: Settings, progress: Progress | None
) -> Drawn:
    """All pictures of both, and the velocity error along the way."""
    seeds = range(settings.first_seed, settings.first_seed + len(prompts))
    drawn: dict[str, list[Picture]] = {"dense": [], "slim": []}
    with comparing(dense, {"slim": slim}) as errors:
        _batches(dense, "dense", prompts, seeds, drawn, settings, progress)
    _batches(slim, "slim", prompts, seeds, drawn, settings, progress)
    fit, counted = fit_pairs(drawn)
    with uncovered(dense) as covers, uncovered(slim) as others:
        counted["drawn_without"] = sorted({*covers, *others})
    texts, numbers = [prompts[place] for place in fit], [seeds[place] for place in fit]
    images = {label: [own[place].image for place in fit] for label, own in drawn.items()}
    return Drawn(texts, numbers, images["dense"], images["slim"], errors["slim"], counted)


def _batches(
    pipe: Any,
    label: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    drawn: dict[str, list[Picture]],
    settings: Settings,
    progress: Progress | None,
) -> None:
    for start in range(0, len(prompts), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        drawn[label] += draw(pipe, prompts[part], seeds[part], **settings.sampling)
        if progress is not None:
            progress(f"{label} images", len(drawn[label]), len(prompts))


def _default_features(pipe: Any) -> Features | None:
    from slimdiff.evaluate.features import LatentFeatures

    vae: Any = getattr(pipe, "vae", None)
    known = vae is not None and hasattr(getattr(vae, "config", None), "latent_channels")
    return LatentFeatures(vae) if known else None


def _call(settings: Settings, given: Mapping[str, Any]) -> str:
    """What to type in Python for the same again."""
    named = [f"{name}={name}" for name, value in given.items() if value is not None]
    names = ["dense", "slim", "prompts", *named]
    return called("slimdiff.evaluate", "evaluate", names, settings=settings)


def _how(dense: Any, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
    weight = next(model_of(dense).parameters())
    seeds = f"{settings.first_seed} to {settings.first_seed + len(prompts) - 1}"
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "prompts": len(prompts),
        "seeds": seeds,
        "settings": asdict(settings),
    }


def _names(dense: Any, slim: Any) -> dict[str, str]:
    kind = type(model_of(dense)).__name__
    return {"dense": _name(dense, "dense"), "slim": _name(slim, "slim"), "class": kind}


def _name(pipe: Any, otherwise: str) -> str:
    path = str(getattr(pipe, "name_or_path", None) or otherwise)
    return path.rstrip("/").rsplit("/", 1)[-1]


def _plan(slim: Any) -> dict[str, Any]:
    record = getattr(model_of(slim), "slim_record", None)
    if record is None:
        return {}
    plan = record.plan
    names = ("recipe", "allocation", "budget", "figures")
    return {"plan": {name: getattr(plan, name) for name in names}}


def _accounts(dense: nn.Module, slim: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and MACs by group, if both denoisers' groups are known."""
    try:
        groups, now = groups_of(dense), groups_of(slim)
        fused = [group.upsampler for group in now if is_fused(slim, group)]
        found = costs.measure(dense, groups, inputs, fused)
    except SlimdiffError:
        return {}
    return accounting.account(groups, found, accounting.entries_of(groups, now))


def _shown(drawn: Drawn, settings: Settings) -> list[dict[str, Any]]:
    rows = zip(drawn.prompts, drawn.seeds, drawn.dense, drawn.slim)
    return [
        {"prompt": prompt, "seed": seed, "dense": base64_png(a), "slim": base64_png(b)}
        for prompt, seed, a, b in list(rows)[: settings.shown]
    ]
