"""The rows of the evidence: what is made, under which budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import slimdiff
from bench import Bench
from measuring import peak_of
from peers import PEERS, int8
from slimdiff import costs

MACS = (0.8,)
RECIPES = (
    ("slimdiff", "probed"),
    ("paper", "entropic 0.3"),  # the best temperature on selection prompts: see ablations.py
    ("paper", "uniform"),
    ("magnitude", "threshold"),
)
WHOLE, SPEEDUPS = (0.35, 0.50), (1.5,)
LAYERS = ("attention", "feed_forward", "resnet")
HEADLINE = "41% slimdiff probed"


Make = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row: its name, what it says of itself, and how the rest is measured."""

    name: str
    labels: dict[str, Any]
    make: Make

    def measured(self) -> dict[str, Any]:
        """The row, or why there is none: some methods cannot reach some sizes."""
        try:
            return self.labels | self.make()
        except slimdiff.SlimdiffError as error:
            return self.labels | {"unavailable": str(error)}


def rows_by_parameters(bench: Bench) -> Iterator[Row]:
    """Every method at every share of attention and feed-forward parameters removed."""
    for share in bench.shares:
        remove = int(share * bench.removable)
        labels = {"group": f"{share:.0%} of attention and feed-forward removed", "removed": share}
        for recipe, allocation in RECIPES:
            name = f"{share:.0%} {recipe} {allocation}"
            count = bench.many if name == HEADLINE else bench.size.images
            own = {"method": f"{recipe}, {allocation}", "origin": "slimdiff"}
            yield Row(
                name,
                labels | own,
                lambda r=recipe, a=allocation, n=remove, c=count: bench.measured(
                    bench.recipe(r, a, slimdiff.Budget(remove=n)), c
                ),
            )
        for peer in (peer for peer in PEERS.values() if peer.structural):
            yield Row(
                f"{share:.0%} {peer.name}",
                labels | {"method": peer.name, "origin": peer.origin},
                lambda p=peer.name, n=remove: bench.measured(bench.peer(p, n), bench.size.images),
            )


def rows_by_macs(bench: Bench) -> Iterator[Row]:
    """Every method at equal MACs, attention and feed-forward alone."""
    for share in () if bench.quick else MACS:
        for recipe, allocation in RECIPES:
            labels = {"group": f"{share:.0%} of all MACs left", "origin": "slimdiff"}
            yield Row(
                f"MACs {share:.0%} {recipe} {allocation}",
                labels | {"method": f"{recipe}, {allocation}"},
                lambda r=recipe, a=allocation, s=share: bench.measured(
                    bench.recipe(r, a, slimdiff.Budget(macs=s)), bench.size.images
                ),
            )
        for peer in (peer for peer in PEERS.values() if peer.structural):
            yield Row(
                f"MACs {share:.0%} {peer.name}",
                {"group": f"{share:.0%} of all MACs left"}
                | {"method": peer.name, "origin": peer.origin},
                lambda p=peer.name, s=share: bench.measured(
                    bench.peer_at_macs(p, s), bench.size.images
                ),
            )


def rows_of_the_whole(bench: Bench) -> Iterator[Row]:
    """ResNets too: shares of all parameters removed, and a measured speed-up."""
    total = costs.parameters(bench.pipe.unet)
    for share in WHOLE[-1:] if bench.quick else WHOLE:
        remove, many = int(share * total), share == WHOLE[-1]
        labels = {"group": f"{share:.0%} of the whole UNet removed", "removed": share}
        yield Row(
            f"whole {share:.0%} slimdiff",
            labels | {"method": "slimdiff, probed", "origin": "slimdiff"},
            lambda n=remove, m=many: bench.measured(
                bench.recipe("slimdiff", "probed", slimdiff.Budget(remove=n), layers=None),
                bench.many if m else bench.size.images,
            ),
        )
        yield Row(
            f"whole {share:.0%} obs-diff",
            labels | {"method": "obs-diff", "origin": PEERS["obs-diff"].origin},
            lambda n=remove: bench.measured(
                bench.peer("obs-diff", n, layers=LAYERS), bench.size.images
            ),
        )
    for speedup in () if bench.quick else SPEEDUPS:
        labels = {"group": f"A denoiser call {speedup} times faster, ResNets too"}
        budget = slimdiff.Budget(speedup=speedup)
        yield Row(
            f"speed {speedup} slimdiff",
            labels | {"method": "slimdiff, probed", "origin": "slimdiff"},
            lambda b=budget: bench.measured(
                bench.recipe("slimdiff", "probed", b, layers=None), bench.size.images
            ),
        )
        yield Row(
            f"speed {speedup} obs-diff",
            labels | {"method": "obs-diff, as many MACs", "origin": PEERS["obs-diff"].origin},
            lambda s=speedup: bench.measured(
                bench.peer_at_macs("obs-diff", bench.macs_at_speed(s), layers=LAYERS),
                bench.size.images,
            ),
        )


def other_rows(bench: Bench) -> Iterator[Row]:
    """Dense, int8 and DeepCache, alone and on top of the headline's slim denoiser."""

    def dense() -> dict[str, Any]:
        return {"unet": bench.trial.copy_of_denoiser(), "seconds": 0.0, "peak_gib": 0.0}

    def slim() -> dict[str, Any]:
        remove = int(0.41 * bench.removable)
        return bench.recipe("slimdiff", "probed", slimdiff.Budget(remove=remove))

    def quantised(made: dict[str, Any]) -> dict[str, Any]:
        macs = bench.trial.macs(made["unet"])
        unet, seconds, peak = peak_of(lambda: int8(made["unet"]))
        taken = {"seconds": round(made["seconds"] + seconds, 1), "peak_gib": peak, "macs": macs}
        return bench.measured({"unet": unet} | taken, bench.size.images)

    labels = {"group": "Dense, and what can be added to it"}
    yield Row(
        "dense",
        labels | {"method": "dense", "removed": 0.0},
        lambda: bench.measured(dense(), bench.many),
    )
    for name, start in (("", dense), ("slimdiff 41 % + ", slim)):
        own = labels | {"method": f"{name}int8", "origin": PEERS["int8"].origin}
        yield Row(f"{name}int8", own, lambda s=start: quantised(s()))
        own = labels | {"method": f"{name}DeepCache", "origin": PEERS["deepcache"].origin}
        yield Row(f"{name}deepcache", own, lambda s=start: bench.cached(s()))
