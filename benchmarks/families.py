"""Every family at the size of a published model: what may shrink, and what that would save.

    python benchmarks/families.py
    python benchmarks/families.py --only flux-dev --only sd3-medium

Models are built on the meta device: nothing is computed, and no weight is held. Widths are uniform,
so the savings are those of shapes alone; MACs are of one forward of one image (or clip) at the
model's native size.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from functools import partial
from typing import Any

import torch

import slimdiff
from measuring import Rows
from published import PUBLISHED
from slimdiff import costs
from slimdiff.bundles import Allocation
from slimdiff.config import recipe_named
from slimdiff.families import family_of
from slimdiff.planning import make_plan

SHARES = (0.8, 0.6)


def measured(name: str) -> dict[str, Any]:
    """The row of one published model."""
    import diffusers

    class_name, config = PUBLISHED[name]
    start = time.perf_counter()
    with torch.device("meta"):
        denoiser = getattr(diffusers, class_name)(**config)
    groups = slimdiff.groups_of(denoiser)
    found = costs.measure(denoiser, groups, costs.example_inputs(denoiser))
    inside = sum(found.groups[g.name].of("params", g.inner) for g in groups)
    held = Counter[str]()
    for group in groups:
        held[group.kind] += found.groups[group.name].of("params", group.inner)
    row: dict[str, Any] = {
        "class": class_name,
        "groups": len(groups),
        "params": found.params,
        "macs": found.macs,
        "in_groups": inside / found.params,
        "held": {kind: count / found.params for kind, count in held.items()},
        "kept": dict(family_of(denoiser).kept),
    }
    statistics = slimdiff.Statistics(class_name, slimdiff.statistics.Probes(1))
    for share in SHARES:
        budget = slimdiff.Budget(params=share)
        recipe, uniform = recipe_named("slimdiff"), Allocation("uniform")
        try:
            plan = make_plan(class_name, groups, found, {}, statistics, budget, recipe, uniform)
        except slimdiff.SlimdiffError as error:
            row[f"macs_at_{share}"] = None
            row[f"why_not_{share}"] = str(error)
            continue
        row[f"params_at_{share}"] = plan.figures["params"] / found.params
        row[f"macs_at_{share}"] = plan.figures["macs"] / found.macs
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(PUBLISHED))
    options = parser.parse_args()
    rows = Rows("families", {"shares": SHARES})
    for name in options.only or PUBLISHED:
        rows.measure(name, partial(measured, name))


if __name__ == "__main__":
    main()
