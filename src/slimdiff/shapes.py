"""The narrow shapes that a plan gives a denoiser's layers, as its config carries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slimdiff.groups import FACTORED, LAYERS, OUTPUTS, Group, is_inward
from slimdiff.layers import layer_at
from slimdiff.plan import Entry


def slim_config(
    denoiser: nn.Module,
    groups: Sequence[Group],
    entries: Mapping[str, Entry],
    fused: Sequence[str] = (),
) -> dict[str, Any]:
    """What `slim_denoiser.reshape_` takes; paths are those of `denoiser`.

    Args:
        denoiser: dense, or slim already; what a group leaves alone is read off its layers.
        groups: of it, all of them.
        entries: group name -> what becomes of it; the others stay as they are.
        fused: paths of the upsamplers that are fused.
    """
    changed = [g for g in groups if g.name in entries and not entries[g.name].is_full]
    config: dict[str, Any] = {"linears": {}, "convolutions": {}, "norms": {}, "attentions": {}}
    inner = {group.name: _inner(group, entries) for group in groups}
    shared = _shared_inputs(groups, inner)
    constants = {
        group.layer: layer_at(denoiser, group.paths[OUTPUTS[group.kind]]).weight.shape[0]
        for group in changed
        if group.kind in OUTPUTS and entries[group.name].width == 0
    }
    changed = [group for group in changed if entries[group.name].width]
    config["factored"] = {g.layer: inner[g.name] for g in changed if g.kind in FACTORED}
    for group in (group for group in changed if group.kind not in FACTORED):
        for role, path in group.paths.items():
            layer = layer_at(denoiser, path)
            if isinstance(layer, nn.GroupNorm):
                config["norms"][path] = [inner[group.name] // group.step, inner[group.name]]
                continue
            kind = "convolutions" if isinstance(layer, nn.Conv2d) else "linears"
            outputs, inputs = layer.weight.shape[:2]
            if is_inward(role):
                config[kind][path] = [inputs, group.rows(role, inner[group.name])]
            else:
                config[kind][path] = [shared.get(path, inner[group.name]), outputs]
    touched = {group.layer for group in changed if LAYERS[group.kind] == "attention"}
    for group in (group for group in groups if group.layer in touched):
        entry = entries.get(group.name)
        width, heads = (group.width, group.heads) if entry is None else (entry.width, entry.heads)
        half = "qk" if group.kind == "query_key" else "vo"
        queries = group.query_width or group.width
        sizes = config["attentions"].setdefault(group.layer, {"heads": heads, "qk": queries})
        sizes.update({"heads": heads, half: width})
    more = {"constants": constants, "fused_upsamplers": dict.fromkeys(fused, 2)}
    return {"version": 1, **config, **{name: part for name, part in more.items() if part}}


def _inner(group: Group, entries: Mapping[str, Entry]) -> int:
    entry = entries.get(group.name)
    return group.inner if entry is None else entry.heads * entry.width


def _shared_inputs(groups: Sequence[Group], inner: Mapping[str, int]) -> dict[str, int]:
    """Inputs of the linears that several groups share: the inner channels of all of them."""
    inputs: dict[str, int] = {}
    for group in groups:
        for role in group.columns:
            path = group.paths[role]
            inputs[path] = inputs.get(path, 0) + inner[group.name]
    return inputs


def joined(earlier: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The slim config of a denoiser that was slim under `earlier` before it became `config`.

    What went wholly is named in `constants` alone; the shortcut of a ResNet that went stays, and
    may be factored.
    """
    if not earlier:
        return dict(config)
    gone = tuple(f"{layer}." for layer in config.get("constants", {}))
    whole: dict[str, Any] = {}
    for part in (*config, *(name for name in earlier if name not in config)):
        if part == "version":
            whole[part] = config[part]
            continue
        both = {**earlier.get(part, {}), **config.get(part, {})}
        stays = {path: own for path, own in both.items() if not f"{path}.".startswith(gone)}
        whole[part] = both if part in ("constants", "factored") else stays
    return whole
