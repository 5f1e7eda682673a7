"""Torch-Pruning: heads lose channels and feed-forward layers hidden units, by group importance.

The package does the work through its public interface: its dependency graph finds what must shrink
together, its pruner ranks and removes, at its defaults (ranking within a layer, one step). The
pruning ratio of each layer is chosen here, so that the target is met; layers other than attention
and feed-forward are ignored. Three settings follow from the model: with `num_heads` every head
loses the same channels (`prune_head_dims`, the default; with few heads, whole ones cost more),
`out_channel_groups` couples the value and the gate of a GEGLU unit, and the query takes up the
change of the softmax scale, which plain diffusers derives from the width of a head.

`taylor` is |weight * gradient| (Molchanov et al., 2019). The gradient is that of the training loss,
mean squared error of the scheduler's prediction type, over latents that the dense pipeline draws
from the calibration prompts, at random timesteps, every tenth prompt empty, as in training for
guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import slimdiff
from peers.job import Job, become_slim, copy_of, entries_of, kept_with, uniform_sizes
from slimdiff import costs
from slimdiff.config import TRANSFORMER
from slimdiff.evaluate import generate
from slimdiff.groups import Group
from slimdiff.plan import Plan

LOSS_PROMPTS = 32
LOSS_BATCH = 8
LOSS_DRAWS = 4
"""Timesteps and noises per latent."""


def magnitude(job: Job) -> nn.Module:
    """Group importance by L2 norm of the weights."""
    import torch_pruning as tp

    return _prune(job, copy_of(job), tp.importance.GroupMagnitudeImportance(p=2))


def taylor(job: Job) -> nn.Module:
    """Group importance by first-order Taylor expansion of the training loss."""
    import torch_pruning as tp

    unet = copy_of(job)
    gradients = kept_with(job.pipe.unet, "gradients", lambda: _gradients(job))
    for name, parameter in unet.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].clone()
    slim = _prune(job, unet, tp.importance.GroupTaylorImportance())
    slim.zero_grad(set_to_none=True)
    return slim


def _prune(job: Job, unet: nn.Module, importance: Any) -> nn.Module:
    import torch_pruning as tp

    groups = slimdiff.groups_of(unet, TRANSFORMER)
    sizes = uniform_sizes(job)
    ratios, heads, halves = _settings(unet, groups, sizes)
    pruner = tp.BasePruner(
        unet,
        _example(unet),
        importance=importance,
        pruning_ratio_dict=ratios,
        num_heads=heads,
        out_channel_groups=halves,
        in_channel_groups={},
        ignored_layers=_others(unet, groups),
        root_module_types=[nn.Linear],
        forward_fn=lambda model, inputs: model(**inputs),
        output_transform=lambda output: output[0].sum(),
    )
    pruner.step()
    _keep_softmax_scale(unet, groups, sizes)
    plan = Plan(type(unet).__name__, "torch-pruning", entries_of(groups, sizes), "uniform")
    return become_slim(unet, job.pipe.unet, plan)


def _settings(
    unet: nn.Module, groups: list[Group], sizes: Mapping[str, int]
) -> tuple[dict[nn.Module, float], dict[nn.Module, int], dict[nn.Module, int]]:
    """The ratio of every layer, heads by projection, and gated projections with their halves."""
    ratios: dict[nn.Module, float] = {}
    heads: dict[nn.Module, int] = {}
    halves: dict[nn.Module, int] = {}
    for group in groups:
        for role in set(group.paths) - {"out", "down"}:
            linear = unet.get_submodule(group.paths[role])
            # Half a channel more, because the package rounds what stays down.
            ratios[linear] = 1 - (sizes[group.layer] + 0.5) / group.width
            if group.kind != "feed_forward":
                heads[linear] = group.heads
            elif group.gated:
                halves[linear] = 2
    return ratios, heads, halves


def _others(unet: nn.Module, groups: list[Group]) -> list[nn.Module]:
    """Layers that are not the start of a group to be pruned."""
    starts = {path for g in groups for role, path in g.paths.items() if role not in ("out", "down")}
    kinds = (nn.Linear, nn.Conv2d)
    return [m for path, m in unet.named_modules() if isinstance(m, kinds) and path not in starts]


def _example(unet: nn.Module) -> dict[str, Any]:
    """One forward's inputs to trace, ones, at the native size."""

    def filled(shapes: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: filled(value) if isinstance(value, dict) else torch.ones_like(value, device="cpu")
            for name, value in shapes.items()
        }

    return filled(costs.example_inputs(unet)) | {"return_dict": False}


def _keep_softmax_scale(unet: nn.Module, groups: list[Group], sizes: Mapping[str, int]) -> None:
    """Logits are divided by the root of the new width: let the query make up for it."""
    for group in groups:
        if group.kind == "query_key":
            query = unet.get_submodule(group.paths["q"])
            factor = (sizes[group.layer] / group.width) ** 0.5
            for parameter in query.parameters():
                parameter.data.mul_(factor)


def _gradients(job: Job) -> dict[str, Tensor]:
    unet, prompts = copy_of(job), job.prompts[:LOSS_PROMPTS]
    images = generate(
        job.pipe,
        prompts,
        range(len(prompts)),
        batch_size=LOSS_BATCH,
        output_type="latent",
        **job.sampling,
    )
    latents = torch.stack(list(images)).clone()
    texts = _texts(job.pipe, ["" if i % 10 == 9 else text for i, text in enumerate(prompts)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(LOSS_DRAWS):
        for start in range(0, len(prompts), LOSS_BATCH):
            part = slice(start, start + LOSS_BATCH)
            _loss(job.pipe.scheduler, unet, latents[part], texts[part], generator).backward()
    return {n: p.grad for n, p in unet.named_parameters() if p.grad is not None}


def _texts(pipe: Any, prompts: list[str]) -> Tensor:
    """Text states of a StableDiffusionPipeline."""
    with torch.no_grad():
        return pipe.encode_prompt(prompts, pipe.device, 1, do_classifier_free_guidance=False)[0]


def _loss(
    scheduler: Any, unet: nn.Module, latents: Tensor, texts: Tensor, generator: torch.Generator
) -> Tensor:
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(latents),), generator=generator).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = {
        "epsilon": lambda: noise,
        "sample": lambda: latents,
        "v_prediction": lambda: scheduler.get_velocity(latents, noise, timesteps),
    }[scheduler.config.prediction_type]()
    prediction = unet(noisy, timesteps, texts, return_dict=False)[0]
    return torch.nn.functional.mse_loss(prediction, target)
