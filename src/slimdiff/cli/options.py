"""Options that several commands share; help and defaults of sampling come from its dataclass."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from slimdiff.config import CalibrationConfig
from slimdiff.errors import SlimdiffError

CALIBRATION = {field.name: field for field in fields(CalibrationConfig)}


def _sampling(name: str, *flags: str) -> Any:
    help = CALIBRATION[name].metadata["help"]
    return typer.Option(*flags, help=help[0].upper() + help[1:], rich_help_panel="Sampling")


def _loading(help: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel="Loading")


def budget(help: str, *flags: str) -> Any:
    """An option of the panel of budgets."""
    return typer.Option(*flags, help=help, rich_help_panel="Budget (one of them)")


Params = Annotated[
    str | None,
    budget("Parameters that stay: a share (0.8) or a count (700M). 0.9 if no budget.", "--params"),
]
Macs = Annotated[
    str | None, budget("Multiply-accumulates of one forward that stay: 0.7 or 300G.", "--macs")
]
Remove = Annotated[str | None, budget("Parameters that go: 0.2 or 100M.", "--remove")]
Memory = Annotated[
    str | None, budget("Bytes of the denoiser's weights that stay: 1.2GB.", "--memory")
]
Speedup = Annotated[
    str | None,
    budget("Times faster that one denoiser call is to be, measured on this machine.", "--speedup"),
]
Latency = Annotated[
    str | None, budget("What one denoiser call may take on this machine: 400ms.", "--latency")
]
Quality = Annotated[
    str | None,
    budget("Largest velocity error on the probes; as few MACs as it allows: 1e-3.", "--quality"),
]


def names(listed: str | None) -> list[str] | None:
    """Names that were given with commas between them.

    Raises:
        SlimdiffError: the list is empty.
    """
    if listed is not None and not listed.strip():
        raise SlimdiffError("--layers is empty; name some, or leave it out for all")
    return [name.strip() for name in listed.split(",")] if listed else None


Model = Annotated[
    str | None,
    typer.Argument(
        help="A diffusers folder, a hub id, or the name of a bundled reference.",
        show_default="scenes-unet, the bundled reference",
    ),
]
Component = Annotated[
    str | None,
    typer.Option(
        "--component",
        help="text_encoder, text_encoder_2 or text_encoder_3: that instead of the denoiser.",
        show_default="the denoiser",
    ),
]
Dense = Annotated[str, typer.Argument(help="The dense pipeline: folder, hub id or bundled name.")]
Slim = Annotated[str, typer.Argument(help="The slim pipeline: folder or hub id.")]
NumPrompts = Annotated[
    int, typer.Option("--num-prompts", help="How many prompts to use, from the start of the file.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", help="File of prompts: one per line, '#' starts a comment; or a JSON list."
    ),
]
Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", help="A prompt; give it again for more images.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

Steps = Annotated[int, _sampling("num_inference_steps", "--steps")]
Guidance = Annotated[float | None, _sampling("guidance_scale", "--guidance")]
BatchSize = Annotated[int, _sampling("batch_size", "--batch-size")]
Seed = Annotated[int, _sampling("seed", "--seed")]
ImageSeed = Annotated[int, typer.Option("--seed", help="Seed of the first image; the next get +1.")]
Height = Annotated[int | None, _sampling("height", "--height")]
Width = Annotated[int | None, _sampling("width", "--width")]
TextTokens = Annotated[int | None, _sampling("max_sequence_length", "--text-tokens")]

Dtype = Annotated[
    str,
    _loading(
        "float32, float16, bfloat16 or auto: float32 on a CPU, else bfloat16 if it is stored so, "
        "else float16; every tensor is then saved in the dtype that it had on disk.",
        "--dtype",
    ),
]
Device = Annotated[
    str, _loading("auto, cpu, cuda, cuda:1, mps, ...; auto is a GPU if there is one.", "--device")
]
Variant = Annotated[
    str | None, _loading("Weights variant to read and write, such as fp16.", "--variant")
]
