"""Render benchmarks/README.md, and the README's table, from the JSON in benchmarks/results/.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emoji_tables import emoji
from evidence_tables import evidence
from family_tables import families, kept
from further_tables import (
    chosen,
    halfway,
    low_memory,
    many,
    refinements,
    removal,
    transformer,
)
from generalisation.summary import render as generalisation
from layer_tables import rest, upsamplers
from peer_outcomes import page as peer_suite
from rendering import made_by, table
from speed_tables import faster, scale, speed

HERE = Path(__file__).parent
HEAD = """# Benchmarks

Every figure here was written by a script of this folder; `python benchmarks/tables.py` renders this
page from `results/`. Times are of one run on the machine named with them, which other jobs shared:
read them as upper bounds.
"""


def ablations(result: dict[str, Any]) -> str:
    """One thing changed at a time."""
    rows, settings = result["rows"], result["settings"]
    shares = [f"{share:.2f}" for share in settings["shares"]]
    base = rows["as it is"]["errors"]
    cells = [
        [name] + [f"{row['errors'][s]:.2e} ({row['errors'][s] / base[s]:.2f})" for s in shares]
        for name, row in rows.items()
    ]
    head = ("one change to the default recipe", *(f"{float(s):.0%} removed" for s in shares))
    return (
        f"## Ablations on scenes-unet\n\nVelocity error on {settings['error_prompts']} selection "
        f"prompts, and in brackets over that of the recipe as it is, at shares of attention and "
        f"feed-forward parameters removed. Calibrated on {settings['calibration_prompts']} prompts "
        f"and 20 steps where the row says nothing else.\n\n"
        f"{table(head, cells)}\n\n{made_by(result)}\n"
    )


def elastic(result: dict[str, Any]) -> str:
    """Two widths over the timesteps against one."""
    rows = [
        [
            f"{row['macs']:.0%}",
            f"{row['low']:.0%} at {row['cheap_steps']} of {row['steps']} steps, else "
            f"{row['high']:.0%}",
            f"{row['one_width']:.2e}",
            f"{row['two_widths']:.2e}",
            f"{row['ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    head = ("mean MACs", "two widths", "error of one width", "of two", "ratio")
    return (
        "## Two widths over the timesteps\n\nVelocity error on selection prompts at equal mean "
        "MACs; timesteps are assigned on one half of the prompts and judged on the other.\n\n"
        f"{table(head, rows)}\n\n{made_by(result)}\n"
    )


def half(result: dict[str, Any]) -> str:
    """Slim models in half precision."""

    def grown(row: dict[str, Any], what: str) -> str:
        over = row[f"groups_whose_{what}_grows_over_2"]
        return f"{row[f'largest_growth_of_a_{what}']['times']:.2f} ({over} groups over 2)"

    dtypes = list(result["rows"][0]["errors"])
    dense = ["100%", *(f"{result['dense'].get(dtype, 0.0):.2e}" for dtype in dtypes), "", ""]
    rows = [
        [f"{row['params_share']:.0%}"]
        + [f"{row['errors'][dtype]:.2e}" for dtype in dtypes]
        + [grown(row, "weight"), grown(row, "activation")]
        for row in result["rows"]
    ]
    head = ("parameters left", *dtypes, "largest weight grows", "largest activation grows")
    return (
        "## Half precision\n\nVelocity error on the probes against the dense float32 model; and "
        "how many times larger than in the dense model the largest weight and activation of a "
        f"group become, at most over all groups.\n\n{table(head, [dense, *rows])}\n\n"
        f"{made_by(result)}\n"
    )


OTHERS = {
    "many": many,
    "rest": rest,
    "upsamplers": upsamplers,
    "removal": removal,
    "refinements": refinements,
    "halfway": halfway,
    "elastic": elastic,
    "half": half,
    "low-memory": low_memory,
    "generalisation": generalisation,
}


def put(name: str, text: str, page: str = "README.md") -> None:
    """Replace a part of the README, or of another page, that stands between comments."""
    path = HERE.parent / page
    start, end = f"<!-- {name}: benchmarks/tables.py -->", f"<!-- end of {name} -->"
    before, rest = path.read_text().split(start)
    path.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    """Write the page, and the README's table."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted((HERE / "results").glob("*.json"))}
    parts = [HEAD]
    if "evidence" in found:
        parts.append(evidence(found["evidence"]))
    if "evidence-emoji-unet" in found:
        put("emoji", emoji(found["evidence-emoji-unet"]))
    own = {n: result for n, result in found.items() if n.startswith("transformer-")}
    parts += [transformer(result) for result in own.values()]
    if own:
        put("transformers", chosen({n.removeprefix("transformer-"): own[n] for n in own}))
    if "families" in found:
        put("families", families(found["families"]))
        put("kept", kept(found["families"]))
    if "ablations" in found:
        parts.append(ablations(found["ablations"]))
    if scales := [result for name, result in found.items() if name.startswith("scale-")]:
        parts.append(scale(scales))
    if speeds := [result for name, result in found.items() if name.startswith("speed-")]:
        recordings = [result for name, result in found.items() if name.startswith("recording-")]
        parts.append(speed(speeds, recordings))
    if results := [result for name, result in found.items() if name.startswith("faster-")]:
        parts.append(faster(results))
    if "peer-suite" in found:
        put("peer-suite", peer_suite(found["peer-suite"]), "docs/diffusers-tests.md")
    parts += [show(found[name]) for name, show in OTHERS.items() if name in found]
    (HERE / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
