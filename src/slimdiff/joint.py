"""Joint errors: what groups of a kind, or of a part of the denoiser, lose together.

Gains are measured with one group shrunk at a time. Errors of many groups add up to more, or less,
than their sum. So each kind of group, and each part of the denoiser, is measured with all of its
groups at their planned sizes and the rest dense; gains are scaled to that, and the plan is made
again, until what it predicts is what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from slimdiff.curves import ErrorCurve
from slimdiff.groups import Group
from slimdiff.plan import Plan
from slimdiff.probing import STAGE, Probed
from slimdiff.swapping import Swaps

AGREEMENT = 1.3
"""Measured over predicted error, of every kind and of all, within which a plan is taken."""

PARTS = 8
"""Blocks that run one after another are measured in so many parts at most."""

FURTHEST = 30.0
"""Gains are scaled by this at most, up or down, in one round."""

REMOVED = "removed"
"""What stands for the kind of a group whose layer goes."""

_NEGLIGIBLE = 0.02  # of the whole error: what loses less need not agree


def kind_of(group: Group, plan: Plan) -> str:
    """What is measured together: the kind of group, or `removed` for layers that go."""
    return REMOVED if plan.entries[group.name].width == 0 else group.kind


def parts_of(groups: Sequence[Group]) -> dict[str, int]:
    """Group name -> which of at most `PARTS` parts of the denoiser it lies in, in its order."""
    stage_of = {group.name: _stage(group.layer) for group in groups}
    stages = list(dict.fromkeys(stage_of.values()))
    count = min(PARTS, len(stages))
    place = {stage: i * count // len(stages) for i, stage in enumerate(stages)}
    return {name: place[stage] for name, stage in stage_of.items()}


def _stage(path: str) -> str:
    found = STAGE.match(path)
    return path if found is None else found.group()


def scaled(
    probed: Probed,
    swaps: Swaps,
    plan: Plan,
    curves: Mapping[str, ErrorCurve],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, ErrorCurve], float, bool]:
    """Curves whose gains agree with what the plan's groups lose together.

    Each group's gain is scaled by its kind's and its part's share, and all by the whole's.

    Args:
        probed: the dense denoiser on probes to choose by.
        swaps: the weights of plans.
        plan: made from `curves`.
        curves: of all groups.
        progress: called with (measurements done, in all).

    Returns:
        The curves, the measured error of the plan, and whether `curves` agreed within `AGREEMENT`.
    """
    weights = swaps.of(plan)
    changed = [group for group in plan.changed(swaps.groups) if group.name in curves]
    place = parts_of(swaps.groups)
    kinds = {group.name: kind_of(group, plan) for group in changed}
    parts = {group.name: str(place[group.name]) for group in changed}
    predicted = {g.name: curves[g.name].of(plan.entries[g.name]) for g in changed}
    names = [*dict.fromkeys(kinds.values())], [*dict.fromkeys(parts.values())]
    count, done = 1 + len(names[0]) + len(names[1]), 0
    measured: list[dict[str, float]] = [{}, {}]
    for table, of, found in zip(measured, (kinds, parts), names, strict=True):
        for name in found:
            own = [weights[g.name] for g in changed if of[g.name] == name]
            table[name] = probed.error(swaps.joined(own))
            done += 1
            if progress is not None:
                progress(done, count)
    whole = probed.error(swaps.joined(weights.values()))
    by_kind, by_part = _fitted(predicted, (kinds, parts), measured)
    total = sum(by_kind[kinds[n]] * by_part[parts[n]] * e for n, e in predicted.items())
    rest = whole / total if total > 0 and whole > 0 else 1.0
    scaled_curves = dict(curves)
    for group in swaps.groups:
        if group.name in curves:
            part = rest * by_part.get(str(place[group.name]), 1.0)
            ends = (part * by_kind.get(kind, 1.0) for kind in (group.kind, REMOVED))
            scaled_curves[group.name] = _scaled(curves[group.name], *map(_limited, ends))
    return scaled_curves, whole, _agree(predicted, kinds, measured[0], whole)


Table = Mapping[str, float]


def _fitted(
    predicted: Table,
    of: tuple[Mapping[str, str], Mapping[str, str]],
    measured: Sequence[Table],
    rounds: int = 8,
) -> tuple[dict[str, float], dict[str, float]]:
    """A factor for each kind and each part; a group's is their product.

    Iterative proportional fitting: the sums of the scaled predictions become those measured, by
    kind and, in their proportions, by part.
    """
    factors = [dict.fromkeys(table, 1.0) for table in measured]
    share = sum(measured[0].values()) / max(sum(measured[1].values()), 1e-300)
    for _ in range(rounds):
        for own, unit in ((1, share), (0, 1.0)):
            sums = dict.fromkeys(measured[own], 0.0)
            for name, error in predicted.items():
                product = factors[0][of[0][name]] * factors[1][of[1][name]]
                sums[of[own][name]] += product * error
            for key, total in sums.items():
                if total > 0 and measured[own][key] > 0:
                    factors[own][key] *= unit * measured[own][key] / total
    return factors[0], factors[1]


def _limited(factor: float) -> float:
    return min(max(factor, 1 / FURTHEST), FURTHEST)


def _scaled(curve: ErrorCurve, factor: float, removing: float) -> ErrorCurve:
    gains = None if curve.gains is None else {w: factor * g for w, g in curve.gains.items()}
    removed = None if curve.removed is None else removing * curve.removed
    return replace(curve, gains=gains, removed=removed)


def _agree(
    predicted: Mapping[str, float],
    kinds: Mapping[str, str],
    measured: Mapping[str, float],
    whole: float,
) -> bool:
    sums = dict.fromkeys(measured, 0.0)
    for name, error in predicted.items():
        sums[kinds[name]] += error
    pairs = [(sum(sums.values()), whole), *((sums[kind], measured[kind]) for kind in measured)]
    telling = [(a, b) for a, b in pairs if max(a, b) > _NEGLIGIBLE * whole]
    return all(a <= AGREEMENT * b and b <= AGREEMENT * a for a, b in telling)
