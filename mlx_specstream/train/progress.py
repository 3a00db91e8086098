"""Where a run stands, how much of its budget is spent, and what the rest will take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .data import Example


@dataclass
class Progress:
    """Where a run stands; everything random is a function of this and the seed.

    update: updates made. log_bytes: length of the log then. elapsed_s: time spent, over all sittings.
    best, best_update, worse, stopped: early stopping. rms: of the hidden states the streams join.
    before: tokens per step decoded before training. epoch, batch, positions: how far a run in epochs
    of growing data is, and how many positions it has trained on.
    """

    update: int = 0
    log_bytes: int = 0
    elapsed_s: float = 0.0
    best: float | None = None
    best_update: int = 0
    worse: int = 0
    stopped: bool = False
    rms: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    batch: int = 0
    positions: int = 0

    def judge(self, loss: float, patience: int) -> bool:
        """Take note of a validation; stop after `patience` without a gain. Return if it is the best."""
        if self.best is None or loss < self.best:
            self.best, self.best_update, self.worse = loss, self.update, 0
            return True
        self.worse += 1
        self.stopped = 0 < patience <= self.worse
        return False


@dataclass(frozen=True)
class Budget:
    """What a run may spend: updates or, if given, minutes."""

    updates: int
    minutes: float = 0.0

    def spent(self, progress: Progress) -> float:
        """Return the share that is spent, 0..1."""
        if self.minutes:
            return min(1.0, progress.elapsed_s / (60 * self.minutes))
        return min(1.0, progress.update / self.updates)

    def updates_left(self, progress: Progress, update_s: float) -> int:
        """Return how many updates there will still be if one takes `update_s`."""
        if self.minutes:
            return round(max(0.0, 60 * self.minutes - progress.elapsed_s) / update_s)
        return self.updates - progress.update

    def __str__(self) -> str:
        return f"{self.minutes:.3g} minutes" if self.minutes else f"{self.updates} updates"


def rate_factor(
    update: int, done: float, *, warmup: int, final: float, shape: str = "linear"
) -> float:
    """Return the learning rate's factor for update `update` (from 0), 1 at the top.

    Linear warm-up; then linear or cosine decay to `final` when `done`, the share behind, is 1.
    """
    warm = min(1.0, (update + 1) / warmup) if warmup else 1.0
    if shape == "constant":
        return warm
    left = 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return warm * (final + (1 - final) * left)


@dataclass(frozen=True)
class Estimate:
    """Seconds of an update and, where known, bytes at the peak."""

    update_s: float
    peak_bytes: int = 0

    def describe(self, updates: int) -> str:
        minutes = self.update_s * updates / 60
        digits = 0 if self.update_s >= 10 else 2
        memory = (
            f"; {self.peak_bytes / 1e9:.2g} GB of memory at the peak" if self.peak_bytes else ""
        )
        return f"about {self.update_s:.{digits}f} s an update, {minutes:.0f} minutes for {updates}{memory}"


def described(
    train: Sequence[Example], valid: Sequence[Example], shape: str, num_parameters: int
) -> str:
    """Say what will be trained on how much."""
    positions = sum(len(example.positions) for example in train)
    held = f", {len(valid)} held out" if valid else ""
    return f"{len(train)} texts with {positions:,} positions{held}; {shape}, {num_parameters:,} parameters."
