"""Rewriting a denoiser that does not fit in memory: block by block, from shards to shards.

The model stands on the meta device. The weights of one block at a time are read, rewritten and
written; what belongs to no group is copied. So no more than a block, one group's statistics and
its decomposition are in memory at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.config import recipe_named
from slimdiff.denoiser import NAMES, settings
from slimdiff.digest import refuse_other_model
from slimdiff.errors import SlimdiffError
from slimdiff.families import groups_of
from slimdiff.folders import read_json, reading, replacing
from slimdiff.groups import Group
from slimdiff.integrity import CONFIG_FILE, WEIGHTS, class_of, config_of
from slimdiff.model_card import write_model_card
from slimdiff.plan import Plan, SlimRecord
from slimdiff.recipes import check_statistics
from slimdiff.removal import check_removed
from slimdiff.rewrite import slim_groups_
from slimdiff.shapes import slim_config
from slimdiff.shards import Shards, ShardWriter, join
from slimdiff.statistics import Statistics

Progress = Callable[[str, int, int], None]


def rewrite_folder(
    folder: str | Path,
    out: str | Path,
    statistics: Statistics,
    plan: Plan,
    *,
    variant: str | None = None,
    max_shard_bytes: int = 2 * 2**30,
    progress: Progress | None = None,
) -> Path:
    """Slim the denoiser in `folder` into folder `out`, whole or not at all, and return `out`.

    What is written is what `rewrite` and `save` would have written. Memory holds the largest block,
    one group's statistics and their decomposition, and at most one shard of what is written.

    Args:
        folder: of a dense denoiser of a known family, with safetensors.
        out: a new folder, an empty one, or that of a denoiser, which is replaced.
        statistics: recorded from it; best `Statistics.open`, which reads one sum at a time.
        plan: a width for every group that shrinks.
        variant: as in diffusers; of what is read and of what is written.
        max_shard_bytes: larger weights are split.
        progress: called with ("rewrite", groups done, groups in all).

    Raises:
        SlimdiffError: no denoiser or no safetensors in `folder`; it is slim already, whose maps
            would have to be in memory; the plan or the statistics belong to another model; `out`
            holds something else.
    """
    folder = Path(folder)
    denoiser = on_meta(folder)
    refuse_slim(denoiser)
    groups = groups_of(denoiser)
    plan.check(groups)
    check_removed(denoiser, groups, plan, statistics)
    for group in plan.narrowed(groups):
        check_statistics(group, statistics, recipe_named(plan.recipe))
    changed, config = plan.changed(groups), slim_config(denoiser, groups, plan.entries, plan.fused)
    shards = Shards(folder, variant)
    shards.refuse_strange(denoiser)
    refuse_other_model(statistics.source, shards.parameters_of(denoiser))
    with replacing(out, CONFIG_FILE) as new:
        writer = ShardWriter(new, WEIGHTS, variant, max_shard_bytes)
        maps = new / ".maps"
        maps.mkdir()
        _rewrite(denoiser, changed, statistics, plan, shards, writer, maps, progress)
        writer.close()
        _describe(denoiser, config, plan, new, maps)
    return Path(out)


def refuse_slim(denoiser: nn.Module) -> None:
    """Refuse a denoiser that is slim already: block by block only dense ones are rewritten.

    Raises:
        SlimdiffError: it is.
    """
    if settings(denoiser).get("slimdiff"):
        raise SlimdiffError(
            f"{type(denoiser).__name__}: is slim already, and in low memory only a dense model is "
            f"rewritten; start from that one with the smaller budget, or leave low memory out"
        )


def on_meta(folder: Path) -> nn.Module:
    """The denoiser of a folder without its weights.

    Raises:
        SlimdiffError: no config, or one of a class that diffusers does not have.
    """
    config = config_of(folder)
    with reading(folder), torch.device("meta"):
        model: nn.Module = class_of(config, folder).from_config(config)
        return model


def _rewrite(
    denoiser: nn.Module,
    changed: list[Group],
    statistics: Statistics,
    plan: Plan,
    shards: Shards,
    writer: ShardWriter,
    maps: Path,
    progress: Progress | None,
) -> None:
    from safetensors.torch import save_file

    from slimdiff.slim_denoiser import compact

    blocks: dict[str, list[Group]] = {}
    for group in changed:
        blocks.setdefault(group.block, []).append(group)
    left, done = dict.fromkeys(shards.names), 0
    for number, (block, groups) in enumerate(blocks.items()):
        module = denoiser.get_submodule(block)
        names = [name for name in left if name.startswith(f"{block}.")]
        _put(module, {name[len(block) + 1 :]: shards.read(name) for name in names})
        own = slim_groups_(denoiser, groups, statistics, plan)
        for name, tensor in module.state_dict().items():
            writer.add(f"{block}.{name}", tensor)
        save_file({n: compact(value) for n, value in own.items()}, maps / f"{number:06d}")
        module.to("meta")
        for name in names:
            del left[name]
        done += len(groups)
        if progress is not None:
            progress("rewrite", done, len(changed))
    for name in left:
        writer.add(name, shards.read(name))


def _put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a module on the meta device its weights, in their own dtype."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor


def _describe(
    denoiser: nn.Module, config: dict[str, Any], plan: Plan, folder: Path, maps: Path
) -> None:
    """Write what stands beside the weights, as `save` does."""
    from slimdiff import slim_denoiser

    slim_denoiser.become_slim_(denoiser, config)
    denoiser.save_config(str(folder))  # type: ignore[operator]  # of ConfigMixin
    source = Path(slim_denoiser.__file__)
    shutil.copyfile(source, folder / f"{slim_denoiser.MODULE}.py")
    (folder / slim_denoiser.PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
    join(sorted(maps.iterdir()), folder / slim_denoiser.MAPS_FILE)
    shutil.rmtree(maps)
    slim_denoiser.write_manifest(folder)


def rewrite_pipeline_folder(
    folder: str | Path, out: str | Path, statistics: Statistics, plan: Plan, **options: Any
) -> Path:
    """As `rewrite_folder`, for the denoiser of a pipeline's folder; the rest is copied.

    Args:
        folder: of a pipeline; a hub id is not fetched.
        out: a new folder, an empty one, or that of a pipeline, which is replaced.
        statistics, plan, options: as for `rewrite_folder`.

    Raises:
        SlimdiffError: as `rewrite_folder`; or `folder` is no pipeline's.
    """
    from slimdiff.slim_denoiser import MODULE

    folder = Path(folder)
    name = denoiser_folder(folder).name
    index = read_json(folder / "model_index.json")
    with replacing(out, "model_index.json") as new:
        shutil.copytree(folder, new, dirs_exist_ok=True, ignore=_leave_out(folder / name))
        rewrite_folder(folder / name, new / name, statistics, plan, **options)
        index[name] = [MODULE, f"Slim{plan.denoiser}"]
        (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        slim = on_meta(new / name)
        slim.slim_record = SlimRecord(plan, {})  # type: ignore[assignment]  # no tensor
        parts = {name: slim, "components": {name: slim}, "name_or_path": str(folder)}
        write_model_card(SimpleNamespace(**parts), new, Path(out).resolve().name)
    return Path(out)


def denoiser_folder(folder: str | Path) -> Path:
    """Where a pipeline's folder keeps its denoiser.

    Raises:
        SlimdiffError: `folder` is no pipeline's, or has no denoiser.
    """
    index = read_json(Path(folder) / "model_index.json")
    name = next((name for name in NAMES if index.get(name)), None)
    if name is None:
        raise SlimdiffError(f"{folder}: its model_index.json names no {' or '.join(NAMES)}")
    return Path(folder) / name


def _leave_out(component: Path) -> Callable[[str, list[str]], set[str]]:
    def ignored(where: str, names: list[str]) -> set[str]:
        hidden = {name for name in names if name.startswith(".")}
        if Path(where) != component.parent:
            return hidden
        stale = {name for name in names if (component.parent / name).is_file()}
        return hidden | {component.name} | {n for n in stale if not n.startswith("LICENSE")}

    return ignored
