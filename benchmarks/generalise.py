"""Defaults on trial across small models of other seeds, widths and worlds.

    python benchmarks/generalise.py train scenes-unet-narrow    # minutes; goes on where stopped
    python benchmarks/generalise.py run                         # every model, variant and budget
    python benchmarks/generalise.py run --models scenes-dit --variants defaults "no removal"
    python benchmarks/generalise.py run --changes mine.json --tag refit
    python benchmarks/generalise.py table

`mine.json` is an object of variants: {"more probes": {"num_probes": 64}}. Rows that are there are
kept, so that a killed run goes on, and several processes may share the models.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
from pathlib import Path

from generalisation.running import NAME, Judging, Runner
from generalisation.specs import SPECS
from generalisation.subjects import subject, subjects
from generalisation.summary import render
from generalisation.training import CACHE, train
from generalisation.variants import BASELINE, BUDGETS, VARIANTS, read
from measuring import RESULTS


def run(options: argparse.Namespace) -> None:
    variants = VARIANTS if options.changes is None else read(options.changes)
    runner = Runner(
        Judging(options.prompts, options.steps),
        options.work,
        options.results,
        options.tag,
        {name: variants[name] for name in options.variants or variants},
        {name: BUDGETS[name] for name in options.budgets},
    )
    for name in options.models or subjects(options.work):
        runner.run(Path(name).name, functools.partial(subject, name, options.work))


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train models, or go on with them")
    training.add_argument("names", nargs="+", choices=list(SPECS))
    running = commands.add_parser("run", help="slim and judge")
    running.add_argument("--models", nargs="+", help="names, or folders of trained models")
    running.add_argument("--variants", nargs="+", help="their names; default: all")
    running.add_argument("--changes", type=Path, help="JSON of other variants than the usual ones")
    running.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    running.add_argument("--tag", default="", help="name of a state of the code, for its rows")
    running.add_argument("--prompts", type=int, default=Judging.prompts, help="unseen prompts")
    running.add_argument("--steps", type=int, default=Judging.steps, help="steps of trajectories")
    rendering = commands.add_parser("table", help="print the tables")
    rendering.add_argument("--baseline", default=BASELINE, help="the variant that others are over")
    for command in (training, running):
        command.add_argument("--work", type=Path, default=CACHE, help="folder of models")
    for command in (running, rendering):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    return whole


def main() -> None:
    options = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.command == "train":
        for name in options.names:
            print(train(SPECS[name], options.work), flush=True)
    elif options.command == "run":
        run(options)
    else:
        kept = json.loads((options.results / f"{NAME}.json").read_text())
        print(render(kept, options.baseline))


if __name__ == "__main__":
    main()
