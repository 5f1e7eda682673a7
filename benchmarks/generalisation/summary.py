"""Tables of the generalisation set: variants against models, geometric means, wins and losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from generalisation.variants import BASELINE
from rendering import made_by, table

Row = Mapping[str, Any]
CLEAR = 2.0
"""Standard errors of the difference over the prompts beyond which a win or a loss counts."""


def render(result: Mapping[str, Any], baseline: str = BASELINE) -> str:
    """All rows as Markdown: one table for each budget, and one over all of them."""
    rows = list(result["rows"].values())
    judging = result["settings"]
    text = (
        "## Across models\n\nSquared error of velocities over squared velocities along the dense "
        f"model's trajectories of {judging['prompts']} prompts that nothing was calibrated with, "
        f"{judging['steps']} steps, both halves of guidance. Geometric means are of errors over "
        f"those of *{baseline}*, on the models that have both; a win or a loss counts where the "
        f"difference over the same prompts exceeds {CLEAR:g} standard errors.\n"
    )
    parts = [overall(rows, baseline)]
    parts += [
        f"### {budget}\n\n{by_model(rows, budget, baseline)}" for budget in _names(rows, "budget")
    ]
    return "\n\n".join([text, *parts, made_by(dict(result))]) + "\n"


def by_model(rows: Sequence[Row], budget: str, baseline: str = BASELINE) -> str:
    """Errors of every variant on every model under one budget."""
    models, own = _names(rows, "model"), [row for row in rows if row["budget"] == budget]
    body = []
    for variant in _names(own, "variant"):
        mine = _of(own, variant)
        cells = [_error(mine.get((model, budget))) for model in models]
        body.append([variant, *cells, *_against(mine, _of(own, baseline))])
    return table(("variant", *models, "geometric mean", "wins : losses"), body)


def overall(rows: Sequence[Row], baseline: str = BASELINE) -> str:
    """Every variant over all models and budgets, and how honest its printed figures are."""
    body = []
    for variant in _names(rows, "variant"):
        mine, base = _of(rows, variant), _of(rows, baseline)
        ratios = [mine[key]["error"] / base[key]["error"] for key in mine if key in base]
        worst = f"{max(ratios):.2f}" if ratios else ""
        kindness = [
            row["error"] / row["error_on_probes"]
            for row in mine.values()
            if row.get("error_on_probes")
        ]
        body.append(
            [variant, *_against(mine, base), worst, f"{geometric_mean(kindness):.2f}"]
            + [str(len(mine))]
        )
    head = ("variant", "geometric mean", "wins : losses", "worst", "unseen over printed", "rows")
    return table(head, body)


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive values; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def verdict(row: Row, base: Row) -> int:
    """1 where `row` errs clearly less than `base` on the same prompts, -1 where more, else 0."""
    differences = [a - b for a, b in zip(row["by_prompt"], base["by_prompt"], strict=True)]
    n, total = len(differences), sum(differences)
    mean = total / n
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) * n / max(n - 1, 1))
    return 0 if abs(total) <= CLEAR * spread else (-1 if total > 0 else 1)


def _against(mine: Mapping[Any, Row], base: Mapping[Any, Row]) -> list[str]:
    """Geometric mean of the errors over those of `base`, and wins to losses."""
    both = [(mine[key], base[key]) for key in mine if key in base]
    if not both:
        return ["", ""]
    mean = geometric_mean(a["error"] / b["error"] for a, b in both)
    verdicts = [verdict(a, b) for a, b in both]
    return [f"{mean:.2f}", f"{verdicts.count(1)} : {verdicts.count(-1)}"]


def _of(rows: Iterable[Row], variant: str) -> dict[tuple[str, str], Row]:
    """(model, budget) -> row of a variant, where there is one."""
    return {
        (row["model"], row["budget"]): row
        for row in rows
        if row["variant"] == variant and "error" in row
    }


def _names(rows: Iterable[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _error(row: Row | None) -> str:
    return f"{row['error']:.2e}" if row else "-"
