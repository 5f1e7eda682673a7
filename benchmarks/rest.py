"""What do the layers outside attention, feed-forward and ResNets hold, and does narrowing them pay?

    python benchmarks/rest.py       # goes on where it was stopped

Shortcuts, down- and upsampling, projections into and out of transformers, time embeddings, first
and last convolution of the bundled UNet. Each alone is factored to a rank that leaves 3/4, 1/2 and
1/3 of it, by the moment of its output on one half of the probes; the error is that on the other
half. Then plans under several budgets with and without those of them that are groups, `projection`;
their figure is the velocity error on selection prompts. No upsampler is fused.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimdiff
from measuring import RESULTS, Rows
from slimdiff import costs, decompose
from slimdiff.bundles import Allocation
from slimdiff.choosing import best_of
from slimdiff.config import RECIPES
from slimdiff.curves import ErrorCurve, probes_of
from slimdiff.decompose import effective_product
from slimdiff.jobs import Job
from slimdiff.probes import Probes
from slimdiff.reference.captions import prompts
from slimdiff.widths import measure_curves
from trial import BATCH, SAMPLING, Size, Trial

KEPT = (0.75, 0.5, 0.35)
CALIBRATION, ERRORS = 128, 24
LAYERS = ("attention", "feed_forward", "resnet")
BUDGETS = {
    "65 % of the parameters": slimdiff.Budget(params=0.65),
    "50 % of the parameters": slimdiff.Budget(params=0.5),
    "80 % of the MACs": slimdiff.Budget(macs=0.8),
    "65 % of the MACs": slimdiff.Budget(macs=0.65),
}


def others(unet: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Path -> layer, of all with weights that no group of `LAYERS` has."""
    groups = slimdiff.groups_of(unet, LAYERS)
    known = {path for group in groups for path in group.paths.values()}
    return {
        path: layer
        for path, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and path not in known
    }


def output_moments(
    unet: nn.Module, layers: dict[str, nn.Linear | nn.Conv2d], probes: Probes
) -> dict[str, tuple[Tensor, int]]:
    """Sums of y y^T (o, o) of what layers put out without their bias, and how many rows."""
    found: dict[str, tuple[Tensor, int]] = {}

    def hook_for(path: str) -> Any:
        def hook(layer: Any, _args: tuple, y: Tensor) -> None:
            y_no = (y.movedim(1, -1) if y.ndim == 4 else y).flatten(0, -2).double()
            y_no = y_no if layer.bias is None else y_no - layer.bias.double()
            total, rows = found.get(path, (0.0, 0))
            found[path] = (total + y_no.mT @ y_no, rows + len(y_no))

        return hook

    handles = [layer.register_forward_hook(hook_for(path)) for path, layer in layers.items()]
    with torch.no_grad():
        for call in probes.batches(1):
            unet(**call)
    for handle in handles:
        handle.remove()
    return found


class Rest:
    """The trial and its statistics, and the rows."""

    def __init__(self, work: Path, results: Path) -> None:
        self.trial = Trial(Size(images=1, errors=ERRORS, runs=1), split="selection")
        self.unet = self.trial.dense
        config = slimdiff.CalibrationConfig(batch_size=BATCH, **SAMPLING)
        texts, self.folder = prompts("calibration", CALIBRATION), work / "rest"
        self.statistics = slimdiff.calibrate(self.trial.pipe, texts, config, checkpoint=self.folder)
        settings = {"calibration_prompts": CALIBRATION, "error_prompts": ERRORS}
        self.rows = Rows("rest", settings | {"sampling": SAMPLING, "kept": KEPT}, results)

    def alone(self) -> None:
        """A row for each layer."""
        layers = others(self.unet)
        moments = output_moments(self.unet, layers, self.statistics.probes.halves()[0])
        calls = len(self.statistics.probes.halves()[0].batches(1))
        held_out = probes_of(self.unet, self.statistics)
        total = costs.measure(self.unet, [], self.trial.one_row)
        for path, layer in layers.items():
            moment, rows = moments[path]
            weight_oi = layer.weight.detach().flatten(1)
            found = decompose.projection(weight_oi, moment / rows)

            def row(
                path: str = path, w_oi: Tensor = weight_oi, rows: int = rows, found: Any = found
            ) -> dict[str, Any]:
                shape = self.unet.get_submodule(path).weight.shape
                made: dict[str, Any] = {
                    "params": w_oi.numel() / total.params,
                    "macs": w_oi.numel() * rows / calls / total.macs,
                }
                for share in KEPT:
                    rank = max(1, int(share * w_oi.numel() / sum(w_oi.shape)))
                    weight = effective_product(w_oi, found.maps(rank)).view(shape)
                    made[f"{share}"] = held_out.error({f"{path}.weight": weight})
                return made

            self.rows.measure(path, row)

    def plans(self) -> None:
        """A row for each budget, with these layers and without."""
        for name, budget in BUDGETS.items():
            for layers in (None, LAYERS):

                def row(budget: Any = budget, layers: Any = layers) -> dict[str, Any]:
                    return self.tried(budget, layers)

                self.rows.measure(f"{name}, {'with' if layers is None else 'without'}", row)

    def tried(
        self, budget: slimdiff.Budget, layers: Sequence[str] | None = None, *, fused: bool = False
    ) -> dict[str, Any]:
        """Size and velocity error of a plan, with upsamplers fused or not."""
        given = RECIPES["slimdiff"], Allocation("probed"), layers, self.curves
        job = Job(self.unet, self.statistics, budget, *given)
        plan = best_of(job if fused else job.fusing(()), Job.plan)
        unet = self.trial.copy_of_denoiser()
        slim = slimdiff.rewrite(unet, self.statistics, plan, curves=self.curves)
        figures = {key: plan.figures[key] for key in ("params", "macs")}
        error = self.trial.velocity_error(slim).relative
        return figures | {"predicted": plan.figures["predicted_error"], "error": error}

    @functools.cached_property
    def curves(self) -> dict[str, ErrorCurve]:
        """Of all groups."""
        return measure_curves(self.unet, self.statistics, folder=self.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rest = Rest(options.work, options.results)
    rest.alone()
    rest.plans()


if __name__ == "__main__":
    main()
