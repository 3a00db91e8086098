"""The training loop, whatever computes an update: killed at any moment, it continues exactly.

    announce ─► updates ... until the budget is spent or a validation stops them ─► finish
                 │ every so often: log, validation, checkpoint

It knows no framework: `trainer.py` trains with MLX, `convert/pytorch/trainer.py` with PyTorch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from tqdm import tqdm

from .awake import awake_s
from .progress import Budget, Progress
from .record import Log


class TrainingLoop(ABC):
    """One run: where it stands, what it may spend, its log. A subclass makes the updates.

    writes: this process keeps log and checkpoints. whole: weights and optimizer belong to the same
    update, so that they can be saved.
    """

    progress: Progress
    budget: Budget
    log: Log
    writes: bool
    whole: bool = True
    since: float
    to_continue = "--resume continues"

    @abstractmethod
    def make_update(self) -> str:
        """Make the next update and count it in `progress`; return its loss, for the progress bar."""

    @abstractmethod
    def validate(self) -> str | None:
        """Measure held-out texts and log that; return what to tell, if anything."""

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint from which the run can continue."""

    @abstractmethod
    def validation_is_due(self) -> bool:
        """Tell whether this update is followed by a validation."""

    @abstractmethod
    def checkpoint_is_due(self) -> bool:
        """Tell whether this update is followed by a checkpoint."""

    @abstractmethod
    def say(self, line: str) -> None:
        """Tell the person who waits."""

    @property
    def is_over(self) -> bool:
        return self.progress.stopped or self.budget.spent(self.progress) >= 1

    def now(self) -> float:
        """Return seconds of a clock that all processes of the run agree about."""
        return awake_s()

    def count_time(self) -> float:
        """Add the time since the last call to the run's; return the seconds of all sittings."""
        now = self.now()
        self.progress.elapsed_s, self.since = self.progress.elapsed_s + now - self.since, now
        return self.progress.elapsed_s

    def make_updates(self) -> None:
        """Update until the budget is spent or nothing is gained any more."""
        timed = bool(self.budget.minutes)
        total = round(60 * self.budget.minutes) if timed else self.budget.updates
        with tqdm(
            total=total,
            initial=min(total, self._spent(timed)),
            desc="train",
            unit="s" if timed else "update",
            disable=None if self.writes else True,
        ) as bar:
            try:
                while not self.is_over:
                    bar.set_postfix_str(self.make_update(), refresh=False)
                    bar.update(min(total, self._spent(timed)) - bar.n)
                    if self.validation_is_due() and (told := self.validate()) and self.writes:
                        bar.write(told)
                    if self.checkpoint_is_due():
                        self.save()
            except KeyboardInterrupt:
                if self.whole:
                    self.save()
                    self.say(f"Stopped after {self.progress.update} updates; {self.to_continue}.")
                raise

    def _spent(self, timed: bool) -> int:
        return int(self.progress.elapsed_s) if timed else self.progress.update
