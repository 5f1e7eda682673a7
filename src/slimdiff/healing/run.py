"""One run of healing: rounds of sampling, training and judging until something ends it."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from slimdiff.errors import SlimdiffError
from slimdiff.healing.config import FALLING
from slimdiff.healing.rows import Batch, Call, Rows
from slimdiff.healing.state import HealFile, Progress
from slimdiff.healing.student import Student
from slimdiff.healing.teacher import Teacher

MOST_LOST = 10
"""Steps in a row without a finite gradient, after which none is expected any more."""
SAME_START = 0.01
"""By how much of itself the error before healing may differ from that of the run to go on with."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What ends healing: time, steps, or whichever comes first."""

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise SlimdiffError("give minutes to heal for, or steps")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise SlimdiffError(f"minutes to heal for must be positive, got {self.minutes}")
        if self.steps is not None and self.steps < 1:
            raise SlimdiffError(f"steps to heal for must be at least 1, got {self.steps}")

    def share(self, done: Progress) -> float:
        """How much of it is over: 1 is the end."""
        shares = []
        if self.minutes is not None:
            shares.append(done.seconds / (60 * self.minutes))
        if self.steps is not None:
            shares.append(done.step / self.steps)
        return max(shares)

    def told(self, done: Progress) -> tuple[int, int]:
        """What is done, and how much it is in all: seconds, or steps."""
        if self.minutes is not None:
            return int(min(done.seconds, 60 * self.minutes)), math.ceil(60 * self.minutes)
        assert self.steps is not None
        return done.step, self.steps


class Healing:
    """Rounds of healing.

    Every round samples prompts with the dense denoiser, trains on what the last rounds gave, and
    is judged on held-out rows. A round depends on its number and the weights alone: a run that
    goes on samples the last rounds again, and needs nothing else of what was in memory.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        limits: Limits,
        file: HealFile | None = None,
        report: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.teacher, self.student, self.limits = teacher, student, limits
        self.file, self.report = file, report
        self.config = student.config
        self.done = Progress()
        self.rounds: list[list[Call]] = []
        self.at_once = student.config.rows_at_once

    def run(self) -> Progress:
        """Heal until something ends it; the student has kept the best weights.

        Raises:
            SlimdiffError: the student's error is not finite to begin with.
        """
        self._clock = time.monotonic()
        self._begin()
        saved = time.monotonic()
        while not self.done.stopped:
            self._round()
            if not self.done.stopped and time.monotonic() - saved >= self.config.save_seconds:
                self._save(self.student.state())
                saved = time.monotonic()
        best = {f"best/{name}": value for name, value in self.student.best.items()}
        self._save(best)
        return self.done

    def _begin(self) -> None:
        """Judge what is there, and take up an earlier run."""
        judge = Rows(self.teacher.judged_by())
        generator = torch.Generator().manual_seed(self.config.seed)
        self._judge, self._judged = judge, judge.some(self.config.held_out_rows, generator)
        squares = sum(float(target.double().square().sum()) for _, target in self._held_out("cpu"))
        self._energy = squares / len(self._judged)
        error = self._error()
        if not math.isfinite(error):
            raise SlimdiffError(
                f"the error before healing is {error}, expected a finite one; are the weights of "
                f"both denoisers finite, and do they run in their dtype?"
            )
        self.student.choose_precision(list(self._held_out()), error)
        self.done = Progress(error, [(0, error)], best=error)
        self.done.precision = str(self.student.precision).removeprefix("torch.")
        self._tick()
        self._resume(error)

    def _held_out(self, device: torch.device | str | None = None) -> Iterator[Batch]:
        device = self.student.device if device is None else device
        return self._judge.batches(self._judged, self.at_once, device)

    def _error(self) -> float:
        with self.student.rounded():
            return self._fitting(lambda: self.student.error(self._held_out()))

    def _fitting(self, attempt: Callable[[], T]) -> T:
        """What `attempt` gives, with half the rows at once as often as memory does not suffice."""
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError:
                if self.at_once == 1:
                    raise
            self.at_once //= 2  # here, where the exception holds no tensors any more
            logger.info("healing: not enough memory; %d rows at once from now on", self.at_once)

    def _resume(self, error: float) -> None:
        found = None if self.file is None else self.file.load()
        if self.file is None or found is None:
            return
        done, state = found
        if abs(done.before - error) > SAME_START * error:
            logger.warning(
                "warning: %s: healed a denoiser whose error was %.2e, this one's is %.2e; "
                "starting over",
                *(self.file.path, done.before, error),
            )
            return
        logger.info("resuming %s after %d steps", self.file.path, done.step)
        self.student.restore(state)
        self.done = done
        if not done.stopped:
            for number in range(max(0, done.round - self.config.buffer_rounds), done.round):
                self._sample(number)
        self._clock = time.monotonic() - done.seconds

    def _sample(self, number: int) -> int:
        """Take in a round's rows, and as many of the rounds before as memory holds."""
        new = self.teacher.round(number, self.config.round_prompts)
        self.rounds.append(new)
        while len(self.rounds) > 1 and (
            len(self.rounds) > self.config.buffer_rounds
            or self._rows.nbytes > self.config.buffer_bytes
        ):
            del self.rounds[0]
        return sum(len(call.output) for call in new)

    @property
    def _rows(self) -> Rows:
        return Rows(call for calls in self.rounds for call in calls)

    def _round(self) -> None:
        new = self._sample(self.done.round)
        rows, config = self._rows, self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_000_007 + self.done.round)
        for _ in range(max(1, round(config.reuse * new / config.batch_size))):
            if self.limits.share(self.done) >= 1:
                break
            if not self._step(rows, generator):
                self.done.stopped = "not finite"
                break
        self.done.round += 1
        self._decide(self._error())

    def _step(self, rows: Rows, generator: torch.Generator) -> bool:
        """One step on rows drawn at random, others where their gradients are not finite."""
        config = self.config
        warm = min(1.0, (self.done.step + 1) / max(1, config.warmup_steps))
        rate = config.learning_rate * warm * (1 - self.limits.share(self.done))
        for _ in range(MOST_LOST):
            places = rows.some(config.batch_size, generator)
            if self._fitting(functools.partial(self._update, rows, places, rate)):
                self.done.step += 1
                self._tick()
                return True
        return False

    def _update(self, rows: Rows, places: list[int], rate: float) -> bool:
        batches = rows.batches(places, self.at_once, self.student.device)
        return self.student.step(batches, self._energy * len(places), rate)

    def _decide(self, error: float) -> None:
        """Keep what is better, and stop where it is time to."""
        done = self.done
        self._tick()
        done.history.append((done.step, error))
        logger.info("healing: step %d, error %.3e (best %.3e)", done.step, error, done.best)
        done.flat = 0 if error < FALLING * done.best else done.flat + 1
        if error < done.best and self.student.keep():
            done.best = error
        if not math.isfinite(error):
            done.stopped = "not finite"
        elif self.limits.share(done) >= 1:
            in_time = self.limits.steps is None or done.step < self.limits.steps
            done.stopped = "time" if in_time else "steps"
        elif done.flat >= self.config.patience:
            done.stopped = "no longer falling"

    def _tick(self) -> None:
        self.done.seconds = time.monotonic() - self._clock
        if self.report is not None:
            self.report("heal", *self.limits.told(self.done))

    def _save(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.file is not None:
            self.file.save(self.done, tensors)
