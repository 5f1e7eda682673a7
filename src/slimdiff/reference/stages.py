"""What training does once, before the denoiser's first step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.reference.bundled import REFERENCES, bundled_path, load_reference
from slimdiff.reference.contract import Reference
from slimdiff.reference.data import encode
from slimdiff.reference.parallel import agree, rank, wait
from slimdiff.reference.state import averages, load_state
from slimdiff.reference.world import World

NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
"""Names of the norms of queries and keys."""


def stage(path: Path, module: Any, work: Callable[[], None]) -> None:
    """Load `module` from `path`, or do `work` on it and leave it there."""
    from safetensors.torch import load_file, save_file

    if not path.exists() and rank() == 0:
        work()
        partial = path.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, partial)
        partial.replace(path)
    wait()
    module.load_state_dict(load_file(path))


def device_named(name: str) -> torch.device:
    """A device; "auto" is the accelerator, or the CPU."""
    if name != "auto":
        return torch.device(name)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def build(kind: Reference, seed: int, device: torch.device) -> tuple[Any, dict[str, nn.Module]]:
    """Autoencoder and networks of `kind` with the weights of `seed`, channels last."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae, networks = kind.vae(), kind.networks()
    for module in (vae, *networks.values()):
        module.to(device, memory_format=torch.channels_last)
    return vae, networks


def take_vae(vae: Any, name: str) -> None:
    """Give `vae` the weights of the bundled reference `name`."""
    from safetensors.torch import load_file

    path = bundled_path(name) / "vae" / "diffusion_pytorch_model.safetensors"
    vae.load_state_dict(load_file(path))


def latent_scaling(out: Path, vae: Any, world: World) -> float:
    """One over the deviation of latents, measured once and kept in `out`."""
    path = out / "scaling.json"
    if not path.exists() and rank() == 0:
        latents = encode(vae, world.draw("train", 256, 0).pixels, 1.0)
        path.write_text(json.dumps(round(1 / float(latents.std()), 3)))
    wait()
    return float(json.loads(path.read_text()))


def starting_state(start: str, kind: Reference) -> Mapping[str, Tensor]:
    """Averaged weights of a training folder or of a bundled reference, as a checkpoint has them."""
    if start not in REFERENCES:
        return load_state(Path(start) / "state.safetensors")[0]
    parts = kind.parts(load_reference(start))
    return {
        f"average/{name}.{path}": weight.detach()
        for name, network in parts.items()
        for path, weight in network.named_parameters()
    }


@torch.no_grad()
def start_from(
    state: Mapping[str, Tensor],
    networks: Mapping[str, nn.Module],
    run: Callable[[], object],
) -> None:
    """Give `networks` the averaged weights of a checkpoint's `state`.

    Norms of queries and keys that the checkpoint lacks get the size that keeps logits about as
    large as they were, measured while `run` runs the networks.

    Raises:
        KeyError: the checkpoint lacks another weight.
    """
    for name, network in networks.items():
        own = averages(state, name)
        for path, parameter in network.named_parameters():
            if path in own:
                parameter.copy_(own[path])
            elif path.split(".")[-2] not in NORMS:
                raise KeyError(f"the checkpoint to start from has no {name}.{path}")
        lacking = [path for path, _ in network.named_parameters() if path not in own]
        norms = [network.get_submodule(path.removesuffix(".weight")) for path in lacking]
        hooks = [norm.register_forward_pre_hook(_match) for norm in norms]
        try:
            if hooks:
                run()
        finally:
            for hook in hooks:
                hook.remove()


def _match(norm: Any, inputs: tuple[Tensor, ...]) -> None:
    """Let `norm`'s output have the size of its input, on average over what it is given."""
    norm.weight.fill_(agree(float(inputs[0].square().mean().sqrt())))
