"""Draw docs/pareto-scenes.svg from benchmarks/results/evidence.json.

python benchmarks/plots.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402  # the backend comes first

HERE = Path(__file__).parent
OURS, WHOLE = "slimdiff, probed", ", ResNets too"
COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]  # a listed colour map


def families(rows: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Method -> its rows at rising shares of parameters removed, the dense point first.

    Variants of slimdiff that know fewer layers are left to the table.
    """
    dense = rows["dense"]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        whole = name.startswith("whole")
        if row["method"].startswith(f"{OURS}, "):
            continue
        if (whole or row.get("removed")) and "unavailable" not in row:
            found.setdefault(row["method"] + whole * WHOLE, [dense]).append(row)
    return {m: sorted(r, key=lambda row: -row["params"]) for m, r in sorted(found.items())}


def style_of(method: str, methods: list[str]) -> dict[str, Any]:
    """One colour and marker for a method; slimdiff thick and black, dashed where ResNets shrink."""
    base = method.removesuffix(WHOLE)
    number, ours = methods.index(base), base == OURS
    return {
        "color": "black" if ours else COLOURS[number % 10],
        "linewidth": 2.4 if ours else 1.1,
        "linestyle": "-" if method == base else "--",
        "marker": "o" if ours else "sv^<>DPXd*"[number % 10],
        "markersize": 5 if ours else 4,
        "label": method,
        "zorder": 3 if ours else 2,
    }


def main() -> None:
    """Write the picture."""
    result = json.loads((HERE / "results" / "evidence.json").read_text())
    rows = result["rows"]
    plt.rcParams |= {"svg.hashsalt": "slimdiff", "font.size": 9, "axes.grid": True}
    plt.rcParams |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    params = rows["dense"]["params"]
    found = families(rows)
    for method, points in found.items():
        style = style_of(method, [m for m in found if not m.endswith(WHOLE)])
        accuracy = [100 * p["scene_accuracy"] for p in points]
        stays = [100 * p["params"] / params for p in points]
        times = [1 / p["sampling_speedup"] for p in points[1:]]
        panels[0].plot(times, accuracy[1:], **style | {"linestyle": ""})
        panels[1].plot(stays, accuracy, **style)
        panels[2].semilogy(stays[1:], [p["velocity_error"] for p in points[1:]], **style)
    added = [r for r in rows.values() if "removed" not in r and r["group"].startswith("Dense")]
    for number, row in enumerate(added):
        spot = (1 / row["sampling_speedup"], 100 * row["scene_accuracy"])
        panels[0].plot(*spot, marker="x", color="grey", linestyle="")
        below = (0, -14 - 11 * (number // 2))
        side = "left" if spot[0] < 0.6 else "right"
        panels[0].annotate(
            row["method"], spot, below, textcoords="offset points", fontsize=7, ha=side
        )
    panels[0].set(xlabel="sampling time, dense = 1", ylabel="scenes right, %")
    panels[1].set(xlabel="parameters of the UNet that stay, %", ylabel="scenes right, %")
    panels[2].set(xlabel="parameters of the UNet that stay, %", ylabel="velocity error")
    for panel in panels[1:]:
        panel.invert_xaxis()
    figure.legend(
        *panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8
    )
    figure.savefig(HERE.parent / "docs" / "pareto-scenes.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
