"""The narrow shapes that a plan gives a denoiser's layers, as its config carries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slimdiff.groups import INWARD, LAYERS, OUTPUTS, Group, layer_at
from slimdiff.plan import Entry


def slim_config(
    denoiser: nn.Module, groups: Sequence[Group], entries: Mapping[str, Entry]
) -> dict[str, Any]:
    """What `slim_denoiser.reshape_` takes; paths are those of `denoiser`.

    Args:
        denoiser: dense; what a group leaves alone is read off its layers.
        groups: dense.
        entries: group name -> what becomes of it; the others stay as they are.
    """
    changed = [g for g in groups if g.name in entries and not entries[g.name].is_full]
    config: dict[str, Any] = {"linears": {}, "convolutions": {}, "norms": {}, "attentions": {}}
    constants = {
        group.layer: layer_at(denoiser, group.paths[OUTPUTS[group.kind]]).weight.shape[0]
        for group in changed
        if group.kind in OUTPUTS and entries[group.name].width == 0
    }
    changed = [group for group in changed if entries[group.name].width]
    for group in changed:
        inner = entries[group.name].heads * entries[group.name].width
        for role, path in group.paths.items():
            layer = layer_at(denoiser, path)
            if isinstance(layer, nn.GroupNorm):
                config["norms"][path] = [inner // group.step, inner]
                continue
            kind = "convolutions" if isinstance(layer, nn.Conv2d) else "linears"
            outputs, inputs = layer.weight.shape[:2]
            rows = 2 * inner if group.gated and role in ("up", "time") else inner
            config[kind][path] = [inputs, rows] if role in INWARD else [inner, outputs]
    touched = {group.layer for group in changed if LAYERS[group.kind] == "attention"}
    for group in (group for group in groups if group.layer in touched):
        entry = entries.get(group.name)
        width, heads = (group.width, group.heads) if entry is None else (entry.width, entry.heads)
        half = "qk" if group.kind == "query_key" else "vo"
        config["attentions"].setdefault(group.layer, {}).update({"heads": heads, half: width})
    return {"version": 1, **config, **({"constants": constants} if constants else {})}
