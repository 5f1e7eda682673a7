"""Which inner channels of a ResNet should go: whole norm groups, or some of every group?

    python benchmarks/norm_groups.py

Channels of some groups leave the statistics of the other groups as they are. An equal share of
every group changes all statistics: there the second convolution is refit by least squares on what
the narrow norm really puts out. Each ResNet of the bundled pipeline shrinks alone; errors are of
its second convolution's output, on calls of selection prompts that the refit did not see.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, silu, unfold

import slimdiff
from measuring import write
from slimdiff.decompose import autocovariances, resnet_channels
from slimdiff.decompose.resnet import LAG_DAMPING
from trial import BATCH, Size, Trial

SHARES = (0.75, 0.5)
CALLS = 6
"""Denoiser calls of `BATCH` images that are fitted, and as many that are judged."""


def inner_maps(unet: nn.Module, path: str, calls: list[Any]) -> list[Tensor]:
    """What `norm2` gets (the first convolution plus the time embedding), call by call."""
    found: list[Tensor] = []
    norm = unet.get_submodule(f"{path}.norm2")
    handle = norm.register_forward_pre_hook(lambda _m, args: found.append(args[0].double()))
    with torch.inference_mode():
        for call, _ in calls:
            unet(**call)
    handle.remove()
    return found


def activated(norm: nn.GroupNorm, x: Tensor, channels: Tensor, groups: int) -> Tensor:
    weight, bias = (p.detach().double()[channels] for p in (norm.weight, norm.bias))
    return silu(group_norm(x[:, channels], groups, weight, bias, norm.eps))


def lags_of(maps: list[Tensor]) -> Tensor:
    sums = sum(autocovariances(x, torch.float64) for x in maps)
    return sums / sum(x[:, 0].numel() for x in maps)


def equal_shares(order_c: Tensor, groups: int, share: float) -> Tensor:
    """The most useful channels of every group, ascending."""
    size = len(order_c) // groups
    kept: list[int] = []
    for group in range(groups):
        own = [c for c in order_c.tolist() if c // size == group]
        kept += own[: max(1, round(share * size))]
    return torch.tensor(sorted(kept))


def least_squares(maps: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The kernel (o, s, 3, 3) that best gives the targets, on unfolded inputs."""
    gram: Any = 0
    cross: Any = 0
    for x, y in zip(maps, targets, strict=True):
        patches = unfold(x, 3, padding=1)
        gram = gram + torch.einsum("bin,bjn->ij", patches, patches)
        cross = cross + torch.einsum("bin,bon->io", patches, y.flatten(2))
    gram.diagonal().add_(LAG_DAMPING * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, cross).mT
    return solved.reshape(-1, maps[0].shape[1], 3, 3)


def relative(maps: list[Tensor], kernel: Tensor, targets: list[Tensor]) -> float:
    pairs = list(zip(maps, targets, strict=True))
    lost = sum(float((conv2d(x, kernel, padding=1) - y).square().sum()) for x, y in pairs)
    return lost / sum(float(y.square().sum()) for y in targets)


def compared(unet: nn.Module, group: slimdiff.groups.Group, calls: list[Any]) -> dict[str, Any]:
    """Errors of one ResNet at each share."""
    norm = unet.get_submodule(f"{group.name}.norm2")
    kernel = unet.get_submodule(f"{group.name}.conv2").weight.detach().double()
    every, count = torch.arange(group.width), group.width // group.step
    inner = inner_maps(unet, group.name, calls)
    dense = [activated(norm, x, every, count) for x in inner]
    targets = [conv2d(x, kernel, padding=1) for x in dense]
    fit, judge = slice(0, CALLS), slice(CALLS, 2 * CALLS)
    whole = resnet_channels(kernel, lags_of(dense[fit]), count)
    single = resnet_channels(kernel, lags_of(dense[fit]), group.width).order_c
    row: dict[str, Any] = {"resnet": group.name, "channels": group.width, "group": group.step}
    for share in SHARES:
        maps = whole.maps(round(share * count) * group.step)
        kept = [x[:, maps["channels"]] for x in dense]
        channels = equal_shares(single, count, share)
        narrow = [activated(norm, x, channels, count) for x in inner]
        refit = least_squares(narrow[fit], targets[fit])
        row[f"{share:.2f}"] = {
            "whole_groups": relative(kept[judge], maps["weight"], targets[judge]),
            "equal_shares": relative(narrow[judge], refit, targets[judge]),
            "channels_of_equal_shares": len(channels),
        }
    return row


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    trial = Trial(Size(images=0, errors=BATCH, runs=1), split="selection")
    step = max(1, len(trial.calls) // (2 * CALLS))
    calls = trial.calls[::step][: 2 * CALLS]
    calls = calls[::2] + calls[1::2]
    unet = trial.pipe.unet
    rows = []
    for group in slimdiff.groups_of(unet, ["resnet"]):
        rows.append(compared(unet, group, calls))
        print(rows[-1], flush=True)
    write("norm-groups", {"calls": CALLS, "images_per_call": BATCH, "rows": rows})


if __name__ == "__main__":
    main()
