"""What steps really cost beside plain tokens, by the clock while decoding.

Costs were measured once, in seconds, perhaps while something else was running. Here a step's price
in plain tokens is held against that: one factor for all plans.
"""

from __future__ import annotations

from dataclasses import dataclass

LOWEST, HIGHEST = 0.75, 1.5  # beyond, it is not the steps: another request or program had its turn
_SMOOTHING = {"plain": 0.2, "steps": 0.1}  # weight of the newest timing
_LONGEST = 2.0  # a timing that took this much longer than expected was interrupted
_STALE = 10  # plain tokens after which the last step's timing is of another time


@dataclass
class TimingCorrection:
    """Smoothed seconds of plain tokens and of steps, in units of what the curve says."""

    of_plain: float = 1.0
    of_steps: float = 1.0
    _since_step: int = 0

    def plain(self, seconds: float, expected: float) -> None:
        """Take in the seconds of a plain token.

        What steps cost, if they are long past, moves along: what changes then is the machine's.
        """
        before = self.of_plain
        self.of_plain += _SMOOTHING["plain"] * (min(seconds / expected, _LONGEST) - before)
        self._since_step += 1
        if self._since_step > _STALE:
            self.of_steps *= self.of_plain / before

    def step(self, seconds: float, expected: float) -> None:
        """Take in the seconds of a step that verified a tree.

        If plain tokens are long past and it is the machine that has slowed down, falling back to
        plain decoding will show it.
        """
        self.of_steps += _SMOOTHING["steps"] * (min(seconds / expected, _LONGEST) - self.of_steps)
        self._since_step = 0

    def fade(self) -> None:
        """Forget a tenth of what steps cost beyond the measured: a way back from a bad moment."""
        self.of_steps += 0.1 * (self.of_plain - self.of_steps)

    @property
    def factor(self) -> float:
        """Return by how much steps are dearer in plain tokens than measured."""
        return min(max(self.of_steps / self.of_plain, LOWEST), HIGHEST)
