"""slimdiff beside its peers on the reference that does not forgive, emoji-unet, in one run.

    python benchmarks/emoji.py            # an hour or two; goes on where it was stopped
    python benchmarks/emoji.py --only "50% of the MACs"

All layers may shrink; the peer is the one that narrows ResNets too. One calibration for all rows;
error, judge and likeness are of held-out test pairs of glyph and background.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import Bench
from rows import dense_row, rows_of_emoji
from trial import Size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts, for a first look")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    options = parser.parse_args()
    bench = Bench(options, "emoji-unet", Size(images=48, errors=24, runs=3), many=48)
    for row in (dense_row(bench), *rows_of_emoji(bench)):
        if options.only in row.name:
            bench.rows.measure(row.name, row.measured)


if __name__ == "__main__":
    main()
