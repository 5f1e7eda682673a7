"""The model card that goes with a saved pipeline: what was done to it, and how to load it."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from slimdiff.components import absent_components, loading_call
from slimdiff.denoiser import ENCODERS, settings, slim_components
from slimdiff.plan import Entry, Plan
from slimdiff.report.names import width_name

CARD_FILE = "README.md"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CARRIED = ("license", "license_name", "license_link")


def write_model_card(pipe: Any, folder: Path, title: str) -> None:
    """Write README.md into `folder` if the denoiser or a text encoder of `pipe` is slim.

    Licence, base model and licence files are taken over from the folder that `pipe` came from.
    """
    if not slim_components(pipe):
        return
    source = Path(str(getattr(pipe, "name_or_path", None) or ""))
    for path in sorted(source.glob("LICENSE*")) if source.name else []:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    card = model_card(pipe, title, loading_call(title, absent_components(folder)))
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def model_card(pipe: Any, title: str, call: str) -> str:
    """The card of a pipeline with slim components, as Markdown with a YAML header.

    `call` is how plain diffusers loads it.
    """
    header, base = _origin(pipe)
    slim = slim_components(pipe)
    parts = [_yaml(header), f"# {title}", _introduction(slim, base)]
    parts += [_figures(name, module, _plan_of(module)) for name, module in slim.items()]
    parts += [_without_self_attention(name, module) for name, module in slim.items()]
    parts += [_loading(title, slim, call)]
    for name, module in slim.items():
        if plan := _plan_of(module):
            parts += [_groups(name, plan), _maps(name, _later(module))]
    parts += [_versions()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plan_of(module: nn.Module) -> Plan | None:
    record = getattr(module, "slim_record", None)
    return None if record is None else record.plan


def _called(name: str) -> str:
    """What tables call a component."""
    return name if name in ENCODERS else "denoiser"


def _origin(pipe: Any) -> tuple[dict[str, str], str]:
    """What the header takes over from the card of the source folder, and the base model's name."""
    origin = str(getattr(pipe, "name_or_path", None) or "")
    if not origin or not Path(origin).is_dir():
        on_hub = _HUB_ID.fullmatch(origin)
        return ({"base_model": origin}, origin) if on_hub else ({}, Path(origin).name)
    readme = Path(origin) / CARD_FILE
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    block = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    lines = block[1].splitlines() if block else []
    pairs = dict(line.split(": ", 1) for line in lines if re.match(r"[a-z_]+: \S", line))
    saved_again = "- slimdiff" in lines
    keys = (*_CARRIED, "base_model") if saved_again else _CARRIED
    kept = {key: pairs[key] for key in keys if key in pairs}
    return kept, kept.get("base_model", "") if saved_again else Path(origin).resolve().name


def _yaml(header: Mapping[str, str]) -> str:
    lines = ["library_name: diffusers", "tags:", "- slimdiff", "- compression"]
    lines += [f"{key}: {value}" for key, value in header.items()]
    return "\n".join(["---", *lines, "---"])


def _introduction(slim: Mapping[str, nn.Module], base: str) -> str:
    of = f" of `{base}`" if base else ""
    classes = {name: type(module).__name__.removeprefix("Slim") for name, module in slim.items()}
    *most, last = [f"{name}{of} (`{dense}`)" for name, dense in classes.items()]
    named = " and the ".join([*([", the ".join(most)] if most else []), last])
    trained = (
        "and then healed: trained to predict what the original predicts along its own "
        "trajectories, without images or labels"
    )
    how = trained if any(_healed(module) for module in slim.values()) else "without training"
    return (
        f"The {named} with narrower layers, made by "
        f"slimdiff in closed form from calibration prompts, {how}. All other "
        f"components are as they were."
    )


def _healed(module: nn.Module) -> bool:
    """Whether its weights were trained after some slimming."""
    return "healed" in (settings(module).get("slimdiff") or {})


def _later(module: nn.Module) -> str | None:
    """What changed its weights after the maps had made them."""
    slim = settings(module).get("slimdiff") or {}
    return "healing" if "healed" in slim else "the refit" if "refit" in slim else None


def _figures(name: str, module: nn.Module, plan: Plan | None) -> str:
    params = sum(parameter.numel() for parameter in module.parameters())
    rows = [(f"Parameters of the {_called(name)}", f"{params:,}")]
    if plan is not None:
        figures = plan.figures
        rows = _before_and_after(_called(name), params, figures)
        rows += [("Recipe", plan.recipe), ("Allocation", plan.allocation)]
        rows += [("Budget", plan.budget)] if plan.budget else []
        error = "Error of its output" if name in ENCODERS else "Velocity error"
        again = "started_from" in figures
        whose = "held-out" if figures.get("held_out") else "the calibration's own"
        beside = ", against the slim model that this was made from" if again else ""
        beside += ", before healing" if "healed" in figures else ""
        for key, text in (
            ("predicted_error", f"{error}, predicted"),
            ("error_on_probes", f"The same, measured on {whose} prompts{beside}"),
        ):
            if key in figures:
                rows.append((text, f"{float(figures[key]):.2e}"))
        rows += _healing(figures["healed"]) if "healed" in figures else []
        if plan.fused:
            rows.append(("Upsamplers fused, which changes no output", str(len(plan.fused))))
    return _table(("", ""), rows)


def _healing(healed: Mapping[str, Any]) -> list[tuple[str, str]]:
    errors = " to ".join(f"{healed[key]:.2e}" for key in ("before", "after"))
    told = f"{healed['steps']:,} steps, {healed['seconds'] / 60:.1f} minutes"
    prompts = f"{healed['prompts']:,} prompts, {healed['held_out']:,} others to judge by"
    return [("Healing", f"{told}, {prompts}"), ("Velocity error on those others", errors)]


def _before_and_after(
    called: str, params: int, figures: Mapping[str, Any]
) -> list[tuple[str, str]]:
    rows = []
    for key, text in (("params", "Parameters"), ("macs", "Multiply-accumulates per forward")):
        dense = figures.get(f"{key}_dense")
        slim = params if key == "params" else figures.get(key)
        if dense and slim:
            share = f"{int(dense):,} to {int(slim):,} ({slim / dense:.1%})"
            rows.append((f"{text} of the {called}", share))
        elif slim:
            rows.append((f"{text} of the {called}", f"{int(slim):,}"))
    return rows


def _without_self_attention(name: str, module: nn.Module) -> str:
    """Names what guidance by perturbed self-attention would look for in vain."""
    layers = module.named_modules()
    gone = [path for path, layer in layers if getattr(layer, "was_self_attention", False)]
    if not gone:
        return ""
    listed = "\n".join(f"- `{path}`" for path in gone)
    return (
        f"Self-attention layers of the {name} that were removed:\n\n{listed}\n\nGuidance that "
        f"perturbs or skips self-attention (PAG, at the middle block by default) has nothing to "
        f"act on there: name other layers, as in `pag_applied_layers`."
    )


def _loading(title: str, slim: Mapping[str, nn.Module], call: str) -> str:
    modules = [f"`{name}/{module.__module__}.py`" for name, module in slim.items()]
    first = next(iter(slim))
    return f"""## Loading

With slimdiff, which runs no code from this folder:

```python
import slimdiff

pipe = slimdiff.load_pipeline("{title}")
```

With diffusers alone; `trust_remote_code` allows it to run {" and ".join(modules)}:

```python
from diffusers import DiffusionPipeline

pipe = {call}
```

{_alone(title, first)}"""


def _alone(title: str, name: str) -> str:
    """How a component loads without its pipeline; diffusers takes no subfolder for that."""
    library = "transformers" if name in ENCODERS else "diffusers"
    return f"""One component alone, by the path of its folder instead of `subfolder`:

```python
from {library} import AutoModel

{name} = AutoModel.from_pretrained("{title}/{name}", trust_remote_code=True)
```"""


def _groups(component: str, plan: Plan) -> str:
    rows = [
        (
            f"`{name}`",
            entry.kind.replace("_", "-"),
            _heads(entry),
            f"{entry.width}" if entry.is_full else _narrowed(entry),
        )
        for name, entry in plan.entries.items()
    ]
    of = f" of the {component}" if component in ENCODERS else ""
    table = _table(("Group", "Kind", "Heads", "Width"), rows)
    return (
        f"<details>\n<summary>Widths of all {len(rows)} groups{of}</summary>\n\n{table}\n\n"
        f"Width is channels per head for attention, hidden units for feed-forward, inner "
        f"channels for a ResNet. A layer that was removed puts out its mean.\n\n</details>"
    )


def _heads(entry: Entry) -> str:
    if entry.dense_heads == 1:
        return ""
    changed = entry.heads != entry.dense_heads
    return f"{entry.dense_heads} to {entry.heads}" if changed else f"{entry.heads}"


def _narrowed(entry: Entry) -> str:
    return f"{entry.dense_width} to {entry.width}" if entry.width else width_name(0)


def _maps(name: str, later: str | None) -> str:
    of = f" of the {name}" if name in ENCODERS else ""
    until, nearly = (f", as they were before {later}", ", if not quite") if later else ("", "")
    return (
        f"## Plan and maps{of}\n\n`{name}/slimdiff.json` is the plan; "
        f"`{name}/slimdiff_maps.safetensors` holds the small matrices that take the original "
        f"weights to these{until}. A LoRA made for the original model does not fit the narrow "
        f"layers as it is: the maps are what carries it over{nearly}."
    )


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _versions() -> str:
    names = ("slimdiff", "diffusers", "transformers", "torch")
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in names]
    return f"Saved with {', '.join(versions)}."
