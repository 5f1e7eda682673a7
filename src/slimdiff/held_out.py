"""Held-out prompts: what a slim model loses on prompts that it was not calibrated with.

They ran through whole trajectories, as a user samples, and gave no moments. On the prompts that
did, less is lost; the difference says whether more of them would help.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from slimdiff.curves import probes_of
from slimdiff.probing import Measured, Probed
from slimdiff.statistics import Statistics

FEW = 1.5
"""Error on held-out prompts over that on the others, from which on prompts are called too few."""

MORE_PROMPTS = 100

logger = logging.getLogger(__name__)


class HeldOut:
    """A denoiser's outputs on held-out inputs, and on some that the moments are of.

    Made before the denoiser is rewritten, it measures what was lost afterwards.
    """

    def __init__(self, denoiser: nn.Module, statistics: Statistics) -> None:
        self.statistics = statistics
        self.judging = probes_of(denoiser, statistics)
        seen = statistics.seen if statistics.held_out else None
        self.seen = Probed(denoiser, seen) if seen is not None and seen.rows else None

    def figures(self) -> dict[str, Any]:
        """What the denoiser as it stands now has lost, for a plan's figures.

        `error_on_probes`: squared difference over squared output of all calls, both halves of
        guidance alike, with `error_interval` over prompts (95 %); `error_guided`: the same of the
        guided prediction; `error_on_seen`: the first on prompts that the moments are of.
        """
        differences = self.judging.differences({})
        plain = self.judging.measured(differences, guided=False)
        guided = self.judging.measured(differences)
        found: dict[str, Any] = {"error_on_probes": plain.error, "held_out": self.held_out}
        if plain.interval is not None:
            found["error_interval"] = list(plain.interval)
        if self.judging.guides:
            found["error_guided"] = guided.error
        if self.seen is not None:
            found["error_on_seen"] = self.seen.measure({}, guided=False).error
            found |= self._advice(plain, found["error_on_seen"])
        return found

    @property
    def held_out(self) -> bool:
        """Whether the probes are of prompts that gave no moments."""
        return self.statistics.held_out

    def _advice(self, unseen: Measured, seen: float) -> dict[str, Any]:
        """What another hundred prompts would bring, where the others lose much more.

        As in least squares, the error on new inputs is s (1 + p / n) and on those of the fit
        s (1 - p / n) for n of them: half of the difference falls as 1 / n.
        """
        prompts = int(self.statistics.source.get("prompts", 0))
        if not prompts or unseen.error <= FEW * seen:
            return {}
        spared = (unseen.error - seen) / 2 * MORE_PROMPTS / (prompts + MORE_PROMPTS)
        share = spared / unseen.error
        logger.warning(
            "warning: prompts that were held out lose %.1f times what the others lose: %d prompts "
            "are few for this model and budget. Another %d would bring about %.0f %% less error",
            *(unseen.error / max(seen, 1e-300), prompts, MORE_PROMPTS, 100 * share),
        )
        return {"more_prompts": {"prompts": MORE_PROMPTS, "share_spared": share}}
