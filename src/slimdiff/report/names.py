"""What figures and kinds of groups are called, on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

METRICS = {"params": "parameters", "macs": "MACs"}

FIGURES = {
    "params": "parameters",
    "macs": "MACs of one call",
    "bytes": "size of the denoiser",
    "peak_memory": "peak memory of one call",
    "denoiser": "time of one call",
    "pipeline": "time of an image",
    "macs_allow": "times faster, as MACs allow",
    "share_reached": "share of it that was reached",
    "predicted_error": "velocity error, guided, predicted",
    "error_guided": "velocity error, guided, on held-out prompts",
    "error_on_probes": "velocity error on held-out prompts",
    "error_on_seen": "velocity error on calibration prompts",
    "refit": "velocity error before and after the refit",
    "healed": "healing: error on held-out prompts",
    "layers_removed": "layers removed wholly",
    "heads_removed": "attention heads removed elsewhere",
    "upsamplers_fused": "upsamplers fused, at no loss",
    "velocity": "velocity error on test prompts",
    "pictures": "pictures left out",
    "psnr": "PSNR to the dense images",
    "ssim": "SSIM to the dense images",
    "frechet": "Fréchet distance",
    "kernel": "kernel distance",
    "clip": "CLIP score",
    "scenes": "pictures drawn right",
}

ERRORS = ("predicted_error", "error_guided", "error_on_probes", "error_on_seen")
"""Figures of a plan that say what it loses."""

COUNTS = ("layers_removed", "heads_removed", "upsamplers_fused")
"""Figures of a plan that count what else changed; each only where it is not 0."""

KINDS = {
    "query_key": "query-key",
    "value_output": "value-output",
    "feed_forward": "feed-forward",
    "resnet": "ResNet channels",
    "modulation": "modulation",
    "projection": "projection",
}
REST = "outside the groups"
REMOVED = "removed"
UNITS = {  # of a width, where the kind's name does not say it
    "query_key": "channels per head \N{MULTIPLICATION SIGN} heads",
    "value_output": "channels per head \N{MULTIPLICATION SIGN} heads",
    "feed_forward": "hidden units",
    "modulation": "rank",
    "projection": "rank",
}
KIND_COLOURS = 7


def figure_name(key: str, figures: Mapping[str, Any]) -> str:
    """What one of `FIGURES` is called among those of a plan: a text encoder has no velocity.

    Errors of a plan that was healed are those of the closed form.
    """
    name = FIGURES[key]
    if figures.get("held_out") is False:
        name = name.replace("held-out", "calibration")
    if "error_guided" not in figures:
        name = name.replace(", guided", "")
    if "refit" in figures and key == "predicted_error":
        name += ", before the refit"
    if "healed" in figures and key in ERRORS:
        name += ", before healing"
    encoder = figures.get("component")
    return name.replace("velocity error", "error of the encoder's output") if encoder else name


def healed_told(healed: Mapping[str, Any]) -> str:
    """What healing took, and what ended it."""
    return f"{healed['steps']} steps, ended by {healed['stopped']}"


def kind_name(kind: str) -> str:
    """A kind of group, or `rest`, as the reader knows it."""
    return REST if kind == "rest" else KINDS.get(kind, kind.replace("_", "-"))


def width_name(width: int) -> str:
    """A width as the reader knows it; 0 is a layer that was removed, and puts out its mean."""
    return f"{width}" if width else REMOVED


def kind_colour(kind: str, kinds: Sequence[str]) -> str:
    """The name of a kind's colour: its own, or of a kind that is new, the next one."""
    known = [*KINDS, *(found for found in kinds if found not in KINDS)]
    return "rest" if kind == "rest" else f"kind-{known.index(kind) % KIND_COLOURS}"


def stage_told(stage: str, time: str, reused: Collection[str]) -> tuple[str, str]:
    """What a stage of compression took, and a note; statistics that were there took nothing."""
    if stage not in reused:
        return time, ""
    return ("reused", "") if stage == "calibrate" else (time, "error curves reused")
