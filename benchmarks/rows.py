"""The rows of the evidence: what is made, under which budget."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import slimdiff
from bench import Bench
from measuring import peak_of
from peers import PEERS, Peer, int8
from slimdiff import costs
from slimdiff.config import TRANSFORMER

MACS = (0.8,)
RECIPES = (
    ("slimdiff", "probed"),
    ("paper", "entropic 0.3"),  # the best temperature on selection prompts: see ablations.py
    ("paper", "uniform"),
    ("magnitude", "threshold"),
)
WHOLE, SPEEDUPS = (0.35, 0.50), (1.5,)
LAYERS = ("attention", "feed_forward", "resnet")
WITH_AND_WITHOUT = ((None, ""), (LAYERS, ", no projections"))
"""All layers that slimdiff narrows, and those that the peer does too."""
HEADLINE = "41% slimdiff probed"

Made = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row: its name, what it says of itself, how its denoiser is made, and what is measured."""

    name: str
    labels: dict[str, Any]
    make: Callable[[], Made]
    measure: Callable[[Made], dict[str, Any]]

    def measured(self) -> dict[str, Any]:
        """The row, or why there is none: some methods cannot reach some sizes."""
        try:
            return self.labels | self.measure(self.make())
        except slimdiff.SlimdiffError as error:
            return self.labels | {"unavailable": str(error)}


def rows_by_parameters(bench: Bench) -> Iterator[Row]:
    """Every method at every share of attention and feed-forward parameters removed."""
    for share in bench.shares:
        remove = int(share * bench.removable)
        labels = {"group": f"{share:.0%} of attention and feed-forward removed", "removed": share}
        yield from _recipes(bench, f"{share:.0%}", labels, slimdiff.Budget(remove=remove))
        yield from _peers(
            bench, f"{share:.0%}", labels, functools.partial(bench.peer, remove=remove)
        )


def rows_by_macs(bench: Bench) -> Iterator[Row]:
    """Every method at equal MACs, attention and feed-forward alone."""
    for share in () if bench.quick else MACS:
        labels = {"group": f"{share:.0%} of all MACs left"}
        yield from _recipes(bench, f"MACs {share:.0%}", labels, slimdiff.Budget(macs=share))
        yield from _peers(
            bench, f"MACs {share:.0%}", labels, functools.partial(bench.peer_at_macs, share=share)
        )


def rows_of_the_whole(bench: Bench) -> Iterator[Row]:
    """ResNets too: shares of all parameters removed, with projections and without."""
    total = costs.parameters(bench.pipe.unet)
    for share in WHOLE[-1:] if bench.quick else WHOLE:
        remove, count = int(share * total), bench.size.images
        labels = {"group": f"{share:.0%} of the whole UNet removed"}
        many = bench.many if share == WHOLE[-1] else count
        budget = slimdiff.Budget(remove=remove)
        for layers, note in WITH_AND_WITHOUT:
            name = f"whole {share:.0%} slimdiff{note}"
            yield _recipe(bench, name, labels, budget, many, layers=layers, note=note)
        yield _peer(
            bench,
            f"whole {share:.0%} obs-diff",
            labels,
            PEERS["obs-diff"],
            functools.partial(bench.peer, "obs-diff", remove, LAYERS),
        )


def rows_by_speed(bench: Bench) -> Iterator[Row]:
    """ResNets too, to a measured speed-up; the peer gets as many MACs as that took.

    Upsamplers are fused in both.
    """
    for speedup in () if bench.quick else SPEEDUPS:
        labels = {"group": f"A call of eight images {speedup} times faster, ResNets too"}
        budget = slimdiff.Budget(speedup=speedup)
        name = f"speed {speedup} slimdiff"
        slim = _recipe(bench, name, labels, budget, bench.size.images, layers=None)

        def as_many_macs(slim: Row = slim) -> Made:
            bench.rows.measure(slim.name, slim.measured)
            share = bench.macs_of_row(slim.name)
            return bench.peer_at_macs("obs-diff", share, layers=LAYERS, fused=True)

        yield slim
        own = labels | {"method": "obs-diff, as many MACs, upsamplers fused"}
        yield _peer(bench, f"speed {speedup} obs-diff", own, PEERS["obs-diff"], as_many_macs)


EMOJI_BUDGETS: tuple[tuple[str, slimdiff.Budget], ...] = (
    ("50% of the MACs left", slimdiff.Budget(macs=0.5)),
    ("65% of the MACs left", slimdiff.Budget(macs=0.65)),
    ("80% of the MACs left", slimdiff.Budget(macs=0.8)),
    ("50% of the parameters left", slimdiff.Budget(params=0.5)),
    ("65% of the parameters left", slimdiff.Budget(params=0.65)),
    ("A call of one image 1.5 times faster", slimdiff.Budget(speedup=1.5)),
    ("A call of one image 2 times faster", slimdiff.Budget(speedup=2)),
)


def rows_of_emoji(bench: Bench) -> Iterator[Row]:
    """Everything may shrink; the peers are told to leave as many parameters, or MACs."""
    total = costs.parameters(bench.pipe.unet)
    for title, budget in EMOJI_BUDGETS:
        labels = {"group": title}
        yield _compressed(bench, title, labels, budget, "slimdiff")
        if budget.macs:
            at = functools.partial(bench.peer_at_macs, share=float(budget.macs), fused=True)
        elif budget.params:
            at = functools.partial(bench.peer, remove=int((1 - float(budget.params)) * total))
        else:
            continue
        make = functools.partial(at, "obs-diff", layers=LAYERS)
        yield _peer(bench, f"{title}: obs-diff", labels, PEERS["obs-diff"], make)
    for title, budget in EMOJI_BUDGETS:
        if not budget.speedup:
            labels = {"group": title}
            yield _compressed(bench, title, labels, budget, "slimdiff, no refit", refit=False)
            uniform = {"allocation": "uniform", "refit": False}
            name = "slimdiff, widths uniform, no refit"
            yield _compressed(bench, title, labels, budget, name, **uniform)


def _compressed(
    bench: Bench,
    title: str,
    labels: dict[str, Any],
    budget: slimdiff.Budget,
    method: str,
    **options: Any,
) -> Row:
    return Row(
        f"{title}: {method}",
        labels | {"method": method, "origin": "slimdiff"},
        functools.partial(bench.compressed, budget, **options),
        lambda made: bench.measured(made, bench.size.images),
    )


def dense_row(bench: Bench) -> Row:
    """The dense pipeline itself."""
    labels: dict[str, Any] = {"group": "Dense, and what can be added to it"}
    return Row(
        "dense",
        labels | {"method": "dense", "removed": 0.0},
        lambda: _dense(bench),
        lambda made: bench.measured(made, bench.many),
    )


def _dense(bench: Bench) -> Made:
    return {"unet": bench.pipe.unet, "seconds": 0.0, "peak_mib": 0.0}


def other_rows(bench: Bench) -> Iterator[Row]:
    """Dense, int8 and DeepCache, alone and on top of the headline's slim denoiser."""

    def slim() -> Made:
        remove = int(0.41 * bench.removable)
        return bench.recipe("slimdiff", "probed", slimdiff.Budget(remove=remove))

    def quantised(start: Callable[[], Made]) -> Made:
        made = start()
        unet, seconds, peak = peak_of(lambda: int8(made["unet"]))
        seconds, peak = round(made["seconds"] + seconds, 1), max(made["peak_mib"], peak)
        macs = bench.trial.macs(made["unet"])
        return {"unet": unet, "seconds": seconds, "peak_mib": peak, "macs": macs}

    def copied(start: Callable[[], Made]) -> Made:
        made = start()
        return made | {"unet": copy.deepcopy(made["unet"])}

    yield dense_row(bench)
    labels: dict[str, Any] = {"group": "Dense, and what can be added to it"}
    for name, start in (("", functools.partial(_dense, bench)), ("slimdiff 41 % + ", slim)):
        own = labels | {"method": f"{name}int8", "origin": PEERS["int8"].origin}
        make = functools.partial(quantised, start)
        yield Row(f"{name}int8", own, make, lambda made: bench.measured(made, bench.size.images))
        own = labels | {"method": f"{name}DeepCache", "origin": PEERS["deepcache"].origin}
        yield Row(f"{name}deepcache", own, functools.partial(copied, start), bench.cached)


def _recipes(
    bench: Bench, prefix: str, labels: dict[str, Any], budget: slimdiff.Budget
) -> Iterator[Row]:
    """A row of each of slimdiff's recipes under a budget, attention and feed-forward alone."""
    for recipe, allocation in RECIPES:
        name = f"{prefix} {recipe} {allocation}"
        count = bench.many if name == HEADLINE else bench.size.images
        yield _recipe(bench, name, labels, budget, count, recipe, allocation)


def _peers(
    bench: Bench, prefix: str, labels: dict[str, Any], make: Callable[[str], Made]
) -> Iterator[Row]:
    """A row of each structural peer, made by its name."""
    for peer in (peer for peer in PEERS.values() if peer.structural):
        making = functools.partial(make, peer.name)
        yield _peer(bench, f"{prefix} {peer.name}", labels, peer, making)


def _recipe(
    bench: Bench,
    name: str,
    labels: dict[str, Any],
    budget: slimdiff.Budget,
    count: int,
    recipe: str = "slimdiff",
    allocation: str = "probed",
    layers: tuple[str, ...] | None = TRANSFORMER,
    note: str = "",
) -> Row:
    return Row(
        name,
        labels | {"method": f"{recipe}, {allocation}{note}", "origin": "slimdiff"},
        lambda: bench.recipe(recipe, allocation, budget, layers=layers),
        lambda made: bench.measured(made, count),
    )


def _peer(
    bench: Bench, name: str, labels: dict[str, Any], peer: Peer, make: Callable[[], Made]
) -> Row:
    return Row(
        name,
        {"method": peer.name, "origin": peer.origin} | labels,
        make,
        lambda made: bench.measured(made, bench.size.images),
    )
