"""Tables of transformers, of layers that go wholly, of refinements, and of little memory."""

from __future__ import annotations

from typing import Any

from rendering import made_by, table
from slimdiff.metrics import wilson

ERROR = "velocity_error"


def transformer(result: dict[str, Any]) -> str:
    """slimdiff on a trained transformer."""
    settings, dense = result["settings"], result["rows"]["dense"]
    rows = sorted(result["rows"].values(), key=lambda row: (row["removed"], row.get(ERROR, 1)))
    cells = [_transformer_row(row, dense) for row in rows]
    head = (
        "removed",
        "method",
        "parameters",
        "MACs",
        "velocity error",
        "scenes right (95 %)",
        "of",
        "PSNR",
        "call, faster",
        "seconds",
    )
    return (
        f"## A trained transformer: {settings['reference']}\n\nShares of all parameters of the "
        f"transformer removed, after one calibration on {settings['calibration_prompts']} prompts. "
        f"Velocity error along the dense trajectory of {settings['errors']} test prompts; calls of "
        f"eight images with guidance, dense and slim in turn, on a machine that ran other jobs "
        f"beside.\n\n{table(head, cells)}\n\n{_by_kind(result)}\n\n{made_by(result)}\n"
    )


def _transformer_row(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    first = [f"{row['removed']:.0%}" if row["removed"] else "", row["method"]]
    if "unavailable" in row:
        return [*first, row["unavailable"], *[""] * 7]
    low, high = row["interval"]
    is_dense = row["method"] == "dense"
    return [
        *first,
        f"{row['params'] / dense['params']:.1%}",
        f"{row['macs'] / dense['macs']:.1%}",
        "" if is_dense else f"{row[ERROR]:.2e}",
        f"{row['scene_accuracy']:.1%} ({low:.1%} to {high:.1%})",
        str(row["images"]),
        "" if is_dense else f"{row['psnr']:.1f}",
        "" if is_dense else f"{row['call_speedup']:.2f}",
        "" if is_dense else f"{row['seconds']:.0f}",
    ]


def _by_kind(result: dict[str, Any]) -> str:
    """What each kind of layer keeps."""
    rows = {n: r for n, r in result["rows"].items() if "params_by_kind" in r and "probed" in n}
    dense = result["rows"]["dense"]["params_by_kind"]
    cells = [
        [name, *(f"{row['params_by_kind'][kind] / dense[kind]:.0%}" for kind in dense)]
        for name, row in rows.items()
    ]
    head = ("parameters that stay in", *(kind.replace("_", "-") for kind in dense))
    return table(head, cells)


def chosen(results: dict[str, dict[str, Any]]) -> str:
    """The README's choice: what the transformers lose at 30 %."""
    cells = []
    for name, result in results.items():
        rows, dense = result["rows"], result["rows"]["dense"]
        cells.append([name, "dense", "", "", f"{dense['scene_accuracy']:.1%} of {dense['images']}"])
        own = [r for r in rows.values() if r["removed"] == 0.3 and "unavailable" not in r]
        for row in sorted(own, key=lambda row: row[ERROR]):
            right = f"{row['scene_accuracy']:.1%} of {row['images']}"
            cells.append(["", row["method"], f"{row[ERROR]:.1e}", f"{row['psnr']:.1f} dB", right])
    return table(("30 % of the transformer removed", "", "velocity error", "PSNR", "right"), cells)


def removal(result: dict[str, Any]) -> str:
    """Layers that go wholly."""
    settings = result["settings"]
    cells = [
        [
            name,
            f"{row['predicted']:.1e}",
            f"{row['on_probes']:.1e}",
            f"{row['velocity']:.2e}",
            f"{row['psnr']:.1f}",
            str(row["layers_removed"]),
        ]
        for name, row in sorted(result["rows"].items(), reverse=True)
    ]
    head = ("parameters left, probes, layers, draw", "predicted", "on probes", "on test prompts")
    return (
        f"## Whole layers that go, on scenes-unet\n\nLayers that may only narrow, or go and put "
        f"out their mean; probes spread over the timesteps, or drawn at random. Velocity error and "
        f"PSNR on {settings['error_prompts']} test prompts.\n\n"
        f"{table((*head, 'PSNR', 'layers gone'), cells)}\n\n{made_by(result)}\n"
    )


def halfway(result: dict[str, Any]) -> str:
    """Calibrated again halfway, or not."""
    settings, rows = result["settings"], result["rows"]

    def cell(share: float, steps: int) -> str:
        own, one = (rows[f"{share:.0%} in {n}"][ERROR] for n in (steps, 1))
        return f"{own:.2e} ({own / one:.2f})"

    shares = [row["share"] for row in rows.values() if row["steps"] == 2]
    cells = [[f"{share:.0%}", *(cell(share, steps) for steps in (1, 2))] for share in shares]
    return (
        f"## Calibrated again halfway, on scenes-unet\n\nShares of all parameters removed in one "
        f"step, or half of it, and the rest after the slim pipeline was calibrated on the same "
        f"{settings['calibration_prompts']} prompts. Velocity error on "
        f"{settings['error_prompts']} selection prompts, and in brackets over that of one step; "
        f"layers may go in both. Below 0.90 everywhere it would have become a default.\n\n"
        f"{table(('removed', 'one step', 'two steps'), cells)}\n\n{made_by(result)}\n"
    )


def refinements(result: dict[str, Any]) -> str:
    """What was tried after the allocation."""
    settings, rows = result["settings"], result["rows"]
    shares = [share for share in settings["shares"] if f"{share:.0%} none" in rows]
    names = [name.split(" ", 1)[1] for name in rows if name.startswith(f"{shares[0]:.0%} ")]

    def cell(share: float, name: str) -> str:
        row, none = (rows.get(f"{share:.0%} {key}") for key in (name, "none"))
        if row is None or none is None:
            return ""
        return f"{row[ERROR]:.2e} ({row[ERROR] / none[ERROR]:.2f})"

    cells = [[name, *(cell(share, name) for share in shares)] for name in names]
    return (
        f"## Refinements after the allocation, on scenes-unet\n\nVelocity error on "
        f"{settings['error_prompts']} selection prompts at equal size, and in brackets over that "
        f"of no refinement, at shares of all parameters removed. One is kept if it is below 0.90 "
        f"everywhere.\n\n"
        f"{table(('refinement', *(f'{share:.0%} removed' for share in shares)), cells)}\n\n"
        f"{made_by(result)}\n"
    )


def low_memory(result: dict[str, Any]) -> str:
    """A denoiser rewritten from shards to shards."""
    blocks, stage, figures = result["blocks"], result["stages"]["rewrite"], result["plan"]
    before = result["process_before_gib"]
    peak = before + stage["peak_above_model_gib"]
    return (
        f"## Little memory\n\nA FLUX denoiser of full width with {blocks['num_layers']} double and "
        f"{blocks['num_single_layers']} single blocks (of 19 and 38; one is in memory at a time), "
        f"random bfloat16 weights, {figures['params_dense'] / 1e9:.2f} to "
        f"{figures['params'] / 1e9:.2f} billion parameters, uniform widths, rewritten from shards "
        f"to shards: {stage['seconds']:.0f} s, peak {peak:.1f} GiB for the whole process "
        f"({before:.1f} before).\n\n{made_by(result)}\n"
    )


MANY = {
    "dense": "dense",
    "slim": "slimdiff, half of the parameters",
    "faster": "slimdiff, a call of eight images 1.5 times faster",
    "obs-diff": "OBS-Diff (ours), half of the parameters",
    "obs-diff-faster": "OBS-Diff (ours), as many MACs as the faster one",
}
"""Names of the rows of many.py, for the reader."""


def many(result: dict[str, Any]) -> str:
    """Scene accuracy on many prompts."""
    rows, dense = result["rows"], result["rows"]["dense denoiser"]
    cells = []
    for name, title in MANY.items():
        parts = [row for own, row in rows.items() if own.startswith(f"{name} ") and "of" in row]
        if not parts:
            continue
        right, of = (sum(row[what] for row in parts) for what in ("right", "of"))
        low, high = wilson(right, of)
        own = rows[f"{name} denoiser"]
        shares = [f"{own[what] / dense[what]:.1%}" for what in ("params", "macs")]
        faster = f"{own['call_speedup']:.2f}x"
        cells.append([title, *shares, faster, f"{right} of {of}", f"{low:.2%} to {high:.2%}"])
    columns = ("", "parameters of the UNet", "MACs", "call faster", "scenes right", "95 %")
    return (
        f"## Many test prompts, on scenes-unet\n\nWhole scenes right, all pipelines under bfloat16"
        f" autocast, after calibration on {result['settings']['calibration_prompts']} prompts.\n\n"
        f"{table(columns, cells)}\n\n{made_by(result)}\n"
    )
