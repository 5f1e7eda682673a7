"""What the report says, worked out from results: totals, shares by block and kind, the summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from slimdiff.errors import SlimdiffError
from slimdiff.report import numbers
from slimdiff.report.names import COUNTS, ERRORS, FIGURES, KINDS, METRICS, figure_name, width_name
from slimdiff.results import Results

MOST_PLACES = 30  # more blocks than this are told together by the first part of their path

Group = Mapping[str, Any]
Key = TypeVar("Key")

_NEEDED = ("name", "kind", "block", "width", "dense_width", *METRICS, "params_dense", "macs_dense")


@dataclass(frozen=True)
class Pair:
    """A figure of the dense model and of the slim one."""

    dense: float
    slim: float

    @property
    def removed(self) -> float:
        """The share that is gone."""
        return 1 - self.slim / self.dense if self.dense else 0.0

    def __add__(self, other: Pair) -> Pair:
        return Pair(self.dense + other.dense, self.slim + other.slim)


def groups_of(results: Results) -> list[Group]:
    """The groups along the network: what goes down, the middle, what comes up again.

    Raises:
        SlimdiffError: a group lacks what the schema asks for.
    """
    groups: list[Group] = results.get("groups") or []
    for number, group in enumerate(groups):
        if lacking := [key for key in _NEEDED if key not in group]:
            raise SlimdiffError(
                f"group {group.get('name', number)} of the results has no {lacking[0]!r}; "
                f"write them again with `slimdiff compress`"
            )
    return sorted(groups, key=lambda g: {"mid": 1, "up": 2}.get(g["block"].split("_")[0], 0))


def kinds_of(groups: Iterable[Group]) -> list[str]:
    """Kinds that occur: the known ones first, always in the same order."""
    found = dict.fromkeys(group["kind"] for group in groups)
    return [kind for kind in KINDS if kind in found] + [kind for kind in found if kind not in KINDS]


def places_of(groups: Iterable[Group]) -> list[str]:
    """Where in the network each group is: `down_blocks.0`, or `down_blocks` of a long network."""
    paths = [group["block"].split(".") for group in groups]
    places = [".".join(path[: 2 if path[1:2] and path[1].isdigit() else 1]) for path in paths]
    return places if len(set(places)) <= MOST_PLACES else [path[0] for path in paths]


def inner_width(group: Group) -> Pair:
    """Channels of all heads together, hidden units, or channels of a ResNet."""
    dense, slim = group.get("dense_heads") or 1, group.get("heads") or 1
    return Pair(dense * group["dense_width"], slim * group["width"])


def widths_told(group: Group) -> tuple[str, str]:
    """The dense width and the one that stays: `40 × 8` per head, or units, or `removed`."""
    dense_heads, heads = group.get("dense_heads") or 1, group.get("heads") or 1
    if dense_heads == 1:
        return f"{group['dense_width']}", width_name(group["width"])
    dense = numbers.product(group["dense_width"], dense_heads)
    slim = numbers.product(group["width"], heads) if group["width"] else width_name(0)
    return dense, slim


def sums(groups: Iterable[Group], keys: Iterable[Key], metric: str) -> dict[Key, Pair]:
    """Parameters or MACs of groups, added up by key."""
    found: dict[Key, Pair] = {}
    for group, key in zip(groups, keys, strict=True):
        here = Pair(group[f"{metric}_dense"], group[metric])
        found[key] = found.get(key, Pair(0, 0)) + here
    return found


def rest_of(results: Results, metric: str) -> Pair | None:
    """What no group has: given, or what is left of the whole denoiser."""
    rest = results.get("rest") or {}
    return Pair(rest[metric], rest[metric]) if metric in rest else None


def total(results: Results, metric: str) -> Pair | None:
    """Parameters or MACs of the whole denoiser, from whichever section tells."""
    cost = (results.get("cost") or {}).get(metric) or {}
    if "dense" in cost and "slim" in cost:
        return Pair(cost["dense"], cost["slim"])
    figures = (results.get("plan") or {}).get("figures") or {}
    if metric in figures and f"{metric}_dense" in figures:
        return Pair(figures[f"{metric}_dense"], figures[metric])
    groups, rest = groups_of(results), rest_of(results, metric)
    if not groups or rest is None:
        return None
    return sum(sums(groups, ["all"] * len(groups), metric).values(), rest)


def measured(results: Results, *path: str) -> Any:
    """What is at `path`; None where it is missing or could not be measured."""
    value: Any = results
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if isinstance(value, Mapping) and "unavailable" in value else value


def timing(results: Results) -> Mapping[str, Any] | None:
    """Seconds of one call and the speed-up: from an evaluation, or from the search for a speed."""
    found = measured(results, "cost", "latency", "denoiser")
    return found or measured(results, "plan", "figures", "latency")


def plan_facts(results: Results) -> dict[str, str]:
    """How the widths were chosen, and the error that was expected of them."""
    plan = results.get("plan") or {}
    figures = plan.get("figures") or {}
    found = {key: str(plan[key]) for key in ("recipe", "allocation", "budget") if plan.get(key)}
    for key in ERRORS:
        if key in figures:
            found[figure_name(key, figures)] = numbers.error(figures[key])
    if refit := figures.get("refit"):
        errors = (numbers.error(error) for error in (refit["before"], figures["error_on_probes"]))
        found[FIGURES["refit"]] = numbers.ARROW.join(errors)
    if healed := figures.get("healed"):
        errors = (numbers.error(healed[key]) for key in ("before", "after"))
        found[FIGURES["healed"]] = numbers.ARROW.join(errors)
    for key in COUNTS:
        if figures.get(key):
            found[FIGURES[key]] = str(figures[key])
    return found


def warnings(results: Results) -> list[str]:
    """What the reader must know before any figure."""
    params = (results.get("cost") or {}).get("params") or {}
    if params.get("slim", 0) <= params.get("dense", 0):
        return []
    names = results.get("model") or {}
    slim, dense = names.get("slim", "slim"), names.get("dense", "dense")
    return [
        f"The second model ({slim}) is larger than the first ({dense}): were they swapped? "
        f"It is `slimdiff evaluate DENSE SLIM`."
    ]


def is_frontier(results: Results) -> bool:
    """Whether they are of `slimdiff frontier` alone: no slim model was made."""
    return "frontier" in results and not results.get("plan") and not results.get("cost")


def title(results: Results) -> str:
    """The slim model's name, as far as the results know it."""
    model = results.get("model") or {}
    if is_frontier(results):
        return f"{model.get('dense') or 'model'}: frontier"
    return str(model.get("slim") or model.get("dense") or model.get("class") or "slim model")


def summary(results: Results) -> str:
    """One sentence: what is gone, and what it cost."""
    dense = measured(results, "model", "dense")
    whose = f"its {measured(results, 'model', 'class') or 'denoiser'}"
    gone = [
        f"{numbers.percent(pair.removed)} of the {name}"
        for metric, name in METRICS.items()
        if (pair := total(results, metric)) and pair.removed >= 0
    ]
    costs = [part for part in (_speed(results), _likeness(results), _scenes(results)) if part]
    if not gone and not costs:
        told = f"{title(results)}: nothing was measured."
        return _knee(results) if is_frontier(results) else told
    named = f" is {dense} with" if dense and dense != title(results) else ":"
    removed = [f"{named} {' and '.join(gone)} of {whose} gone"] if gone else []
    return f"{title(results)}{'' if gone else ': '}{'; '.join(removed + costs)}."


def _speed(results: Results) -> str:
    found = timing(results)
    allowed = measured(results, "cost", "macs_allow")
    most = f" (its MACs allow {numbers.times(allowed)})" if allowed else ""
    return f"one call is {numbers.faster(found['speedup'])}{most}" if found else ""


def _likeness(results: Results) -> str:
    error = measured(results, "fidelity", "velocity", "relative")
    psnr = measured(results, "fidelity", "images", "psnr")
    parts = []
    if error is not None:
        parts.append(f"its {FIGURES['velocity']} is {numbers.error(error)}")
    if psnr is not None:
        parts.append(f"images of the same seeds agree to {psnr:.1f} dB PSNR")
    return " and ".join(parts)


def _scenes(results: Results) -> str:
    dense = measured(results, "fidelity", "scenes", "dense", "whole")
    slim = measured(results, "fidelity", "scenes", "slim", "whole")
    if slim is None:
        return ""
    before = "" if dense is None else f" (dense: {numbers.percent(dense)})"
    return f"{numbers.percent(slim)} of the pictures are drawn right{before}"


def _knee(results: Results) -> str:
    """Of a frontier alone: where to look first."""
    found = results["frontier"]
    knee, dense = found["points"][found["knee"]], found["dense"]
    stays = " and ".join(
        f"{numbers.percent(knee[metric] / dense[metric])} of the {name}"
        for metric, name in METRICS.items()
    )
    error = numbers.error(knee["predicted"])
    return f"At the knee {stays} stay, with a velocity error of {error}, predicted."
