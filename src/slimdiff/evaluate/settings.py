"""How an evaluation samples, times and shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How both pipelines are sampled, timed and shown.

    Attributes:
        num_inference_steps, guidance_scale, batch_size, height, width, max_sequence_length: as for
            `generate`.
        first_seed: of the first prompt's image; the next ones get 1 more each.
        runs: timed denoiser calls of each model.
        pipeline_runs: timed images of each model; 0 leaves the pipeline's latency out.
        shown: image pairs that go into the results.
    """

    num_inference_steps: int = 20
    guidance_scale: float | None = None
    batch_size: int = 4
    height: int | None = None
    width: int | None = None
    max_sequence_length: int | None = None
    first_seed: int = 0
    runs: int = 11
    pipeline_runs: int = 3
    shown: int = 8

    @property
    def sampling(self) -> dict[str, Any]:
        """What `generate` takes."""
        names = (
            *("num_inference_steps", "guidance_scale", "batch_size"),
            *("height", "width", "max_sequence_length"),
        )
        return {name: getattr(self, name) for name in names}
