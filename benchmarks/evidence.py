"""slimdiff beside its peers on the bundled pipeline, on held-out test prompts, in one run.

    python benchmarks/evidence.py            # hours; goes on where it was stopped
    python benchmarks/evidence.py --quick    # minutes: 41 %, and half of the UNet, few prompts;
                                             # its results stay in the work folder
    python benchmarks/evidence.py --only "41%"

Every row removes the same number of parameters from attention and feed-forward layers (20, 41, 60
and 75 % of them), or the same share of all MACs; at the end ResNets shrink too, beside OBS-Diff's
rule for the same layers. All of them work from one calibration. Calibration and test prompts are
disjoint, and the reference was trained on neither.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import Bench
from evidence_tables import evidence
from rows import (
    other_rows,
    rows_by_macs,
    rows_by_parameters,
    rows_by_speed,
    rows_of_the_whole,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts, for a first look")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    parser.add_argument("--backwards", action="store_true", help="last row first: a second process")
    options = parser.parse_args()
    bench = Bench(options)
    rows = [
        *other_rows(bench),
        *rows_by_parameters(bench),
        *rows_by_macs(bench),
        *rows_of_the_whole(bench),
        *rows_by_speed(bench),
    ]
    for row in reversed(rows) if options.backwards else rows:
        if options.only in row.name:
            bench.rows.measure(row.name, row.measured)
    if options.quick and "dense" in bench.rows.rows:
        print(evidence(bench.rows.result))


if __name__ == "__main__":
    main()
