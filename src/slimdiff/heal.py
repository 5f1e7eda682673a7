"""Healing: the dense denoiser teaches the slim one along its own trajectories, by gradient descent.

An option after slimming in closed form. It needs prompts alone, no images and no labels: the dense
pipeline samples them as its users do, always from new noise, and the slim denoiser is trained to
put out what the dense one put out in each of these calls. The loss is what errors are measured by:
squared differences of the predictions, of all timesteps and both halves of guidance alike, over the
squared dense predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from slimdiff.budget import Saving
from slimdiff.calibrate import held_out as held_out_places
from slimdiff.checksums import weights_digest
from slimdiff.config import CalibrationConfig
from slimdiff.denoiser import ENCODERS, denoiser_of, settings, standing_in
from slimdiff.digest import model_digest
from slimdiff.errors import SlimdiffError
from slimdiff.healing.config import HealConfig, HealResult
from slimdiff.healing.run import Healing, Limits
from slimdiff.healing.state import HealFile, Progress
from slimdiff.healing.student import Student
from slimdiff.healing.teacher import Teacher, split
from slimdiff.held_out import HeldOut
from slimdiff.journal import Journal
from slimdiff.plan import Plan
from slimdiff.stored import round_, saved_dtypes
from slimdiff.wrapped import refuse_offloaded

__all__ = ["HealConfig", "HealResult", "heal"]


def heal(
    dense: Any,
    slim: Any,
    prompts: Sequence[str],
    *,
    minutes: float | None = None,
    steps: int | None = None,
    held_out: Sequence[str] | None = None,
    sampling: CalibrationConfig | None = None,
    config: HealConfig | None = None,
    saving: Saving | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> HealResult:
    """Train a slim denoiser, in place, to predict what the dense one predicts.

    AdamW on float32 masters, at a rate that falls to zero when the time or the steps are up. What
    is kept are the weights with the smallest error on held-out prompts: those that it came with, if
    none were better. Errors are of weights as the denoiser will hold them. All parameters are
    trained, shapes stay. Healing ends before the time if the error no longer falls.

    Args:
        dense: the dense pipeline; it is not changed.
        slim: the slim pipeline or its bare denoiser, on the device of the dense one.
        prompts: of the kind that the model will be given.
        minutes: how long to train, sampling and judging included.
        steps: how many optimizer steps to make; with `minutes` whichever ends first.
        held_out: prompts to judge by; a tenth of `prompts` if None, which are then not trained on.
        sampling: how the dense pipeline samples.
        config: how to train.
        saving: in which dtypes the denoiser will be saved, if not in those that it has; its weights
            are rounded so.
        checkpoint: folder that is saved to in between; the same call goes on from there.
        progress: called with ("heal", done, in all), in seconds or in steps.

    Raises:
        SlimdiffError: neither minutes nor steps; too few prompts; a slim denoiser that is the dense
            one, or on another device; an error that is not finite before healing.
    """
    config, limits = config or HealConfig(), Limits(minutes, steps)
    train, judging = _prompts(prompts, held_out, config)
    teacher = Teacher(dense, train, judging, sampling or CalibrationConfig(), config.seed)
    denoiser = slim if isinstance(slim, nn.Module) else denoiser_of(slim)[1]
    _check_pair(denoiser_of(dense)[1], denoiser)
    origin = _origin(teacher, denoiser, config, limits)
    file = None if checkpoint is None else HealFile(checkpoint, origin)
    dtypes = saved_dtypes(denoiser, saving.dtypes) if saving else {}
    with Student(denoiser, config, dtypes) as student:
        done = Healing(teacher, student, limits, file, progress).run()
    round_(denoiser, dtypes)
    result = _result(done, len(train), len(judging))
    _mark(denoiser, result)
    return result


def heal_slimmed(
    journal: Journal,
    dense: nn.Module,
    plan: Plan,
    held_out: HeldOut,
    checkpoint: str | Path | None,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Heal what a compression made of `dense`, and note it in the figures of its plan.

    Args:
        journal: its settings have the minutes; its pipeline has the slim denoiser.
        dense: a copy of the denoiser as it was.
        plan: gets the figures.
        held_out: measures what is lost on the prompts that calibration held out: healing does not
            train on these, and is judged by them.
        checkpoint, progress: as for `heal`.
    """
    slim, judging = denoiser_of(journal.pipe)[1], set(held_out_places(len(journal.prompts)))
    texts = dict(enumerate(journal.prompts))
    train = [text for place, text in texts.items() if place not in judging]
    how: dict[str, Any] = {"sampling": journal.config, "minutes": journal.settings["heal"]}
    how["held_out"] = list(dict.fromkeys(texts[place] for place in sorted(judging)))
    train = [text for text in train if text not in how["held_out"]]
    how |= {"config": HealConfig(seed=journal.config.seed)}
    how |= {"checkpoint": checkpoint, "progress": progress, "saving": journal.saving}
    with journal.timed("heal"), standing_in(journal.pipe, dense) as pipe:
        result = heal(pipe, slim, train, **how)
    plan.figures["healed"] = result.figures() | held_out.figures()


def check_heal(minutes: float | None, prompts: Sequence[str], component: str) -> None:
    """Refuse what `heal` would, before minutes are spent on slimming.

    Raises:
        SlimdiffError: as `heal`; or it is a text encoder that is slimmed.
    """
    if minutes is None:
        return
    Limits(minutes)
    split(prompts, 0)
    if component in ENCODERS:
        raise SlimdiffError(f"healing is for denoisers; leave it out for {component}")


def _prompts(
    prompts: Sequence[str], held_out: Sequence[str] | None, config: HealConfig
) -> tuple[list[str], list[str]]:
    if held_out is None:
        return split(prompts, config.seed)
    for name, texts in (("prompts", prompts), ("held_out", held_out)):
        if isinstance(texts, str) or not texts:
            raise SlimdiffError(f"{name} is {texts!r}, expected a list of at least one prompt")
    if both := sorted(set(prompts) & set(held_out)):
        raise SlimdiffError(
            f"the prompt {both[0]!r} is trained on and held out; judge by others than these"
        )
    return list(prompts), list(held_out)


def _check_pair(dense: nn.Module, slim: nn.Module) -> None:
    if dense is slim:
        raise SlimdiffError(
            "the slim denoiser is the dense one itself; compress a copy (copy.deepcopy), or load "
            "both"
        )
    for model in (dense, slim):
        refuse_offloaded(model)
    there, here = next(slim.parameters()).device, next(dense.parameters()).device
    if there != here:
        raise SlimdiffError(
            f"the slim denoiser is on {there}, the dense one on {here}; move both to one device"
        )


def _origin(
    teacher: Teacher, slim: nn.Module, config: HealConfig, limits: Limits
) -> Mapping[str, Any]:
    """What tells one way to heal from others: two with equal origins go the same way."""
    how = asdict(config) | {"save_seconds": None}
    texts = [list(teacher.prompts), list(teacher.held_out), asdict(teacher.sampling)]
    own = {"dense": model_digest(teacher.pipe), "slim": weights_digest(slim)}
    return own | {"how": how, "texts": texts, "limits": asdict(limits)}


def _result(done: Progress, prompts: int, held_out: int) -> HealResult:
    return HealResult(
        before=done.before,
        after=done.best,
        steps=done.step,
        seconds=round(done.seconds, 2),
        stopped=done.stopped,
        precision=done.precision,
        history=done.history,
        prompts=prompts,
        held_out=held_out,
    )


def _mark(denoiser: Any, result: HealResult) -> None:
    """Note in the plan what was done, and in the config that weights were trained, if they were."""
    record = getattr(denoiser, "slim_record", None)
    if record is not None:
        record.plan.figures["healed"] = result.figures()
    slim = settings(denoiser).get("slimdiff")
    if slim and result.after < result.before:
        told = {"steps": result.steps}
        denoiser.register_to_config(slimdiff=slim | {"healed": told})
