"""Evaluation: how far a slim pipeline is from the dense one, and what it costs."""

from slimdiff.evaluate.latency import Timing, interleaved
from slimdiff.evaluate.sampling import generate
from slimdiff.evaluate.settings import Settings
from slimdiff.evaluate.suite import evaluate
from slimdiff.evaluate.velocity import (
    VelocityError,
    comparing,
    model_of,
    velocity_error,
    velocity_errors,
)
from slimdiff.metrics import psnr, ssim, wilson
from slimdiff.picture import image_grid

__all__ = [
    "Settings",
    "Timing",
    "VelocityError",
    "comparing",
    "evaluate",
    "generate",
    "image_grid",
    "interleaved",
    "model_of",
    "psnr",
    "ssim",
    "velocity_error",
    "velocity_errors",
    "wilson",
]
