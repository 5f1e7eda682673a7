"""Training-free structural compression of diffusion models."""

from slimdiff.budget import Budget
from slimdiff.calibrate import calibrate
from slimdiff.checkpoint import load, load_pipeline, save, save_pipeline
from slimdiff.config import RECIPES, CalibrationConfig
from slimdiff.errors import SlimdiffError
from slimdiff.families import groups_of
from slimdiff.heal import HealConfig, HealResult, heal
from slimdiff.pipeline import allocate, compress
from slimdiff.plan import Entry, Plan
from slimdiff.record import record
from slimdiff.rewrite import rewrite
from slimdiff.signatures import select_prompts
from slimdiff.statistics import Statistics

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Budget",
    "CalibrationConfig",
    "Entry",
    "HealConfig",
    "HealResult",
    "Plan",
    "SlimdiffError",
    "Statistics",
    "allocate",
    "calibrate",
    "compress",
    "groups_of",
    "heal",
    "load",
    "load_pipeline",
    "record",
    "rewrite",
    "save",
    "save_pipeline",
    "select_prompts",
]
