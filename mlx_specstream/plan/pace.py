"""The pace: what steps really cost beside plain tokens, going by the clock while decoding.

Costs were measured once, in seconds, perhaps while something else was running. Here a step's price
in plain tokens is held against that: one factor for all plans, near 1 until enough of both was timed.
"""

from __future__ import annotations

from dataclasses import dataclass

LOWEST, HIGHEST = 0.75, 1.5  # beyond, it is not the steps: another request or program had its turn
_DECAY = 0.98  # per timing of either kind, so that a ratio is not of two different hours
_PRIOR = 6.0  # timings that the measured costs are worth
_LONGEST = 2.0  # a timing that took this much longer than expected was interrupted


@dataclass
class Pace:
    """Decayed sums of seconds in units of what the curve says, for plain tokens and for steps."""

    plain_sum: float = 0.0
    plain_weight: float = 0.0
    step_sum: float = 0.0
    step_weight: float = 0.0

    def plain(self, seconds: float, expected: float) -> None:
        """Take in the seconds of a plain token."""
        self._fade()
        self.plain_sum += min(seconds / expected, _LONGEST)
        self.plain_weight += 1

    def step(self, seconds: float, expected: float) -> None:
        """Take in the seconds of a step that verified a tree."""
        self._fade()
        self.step_sum += min(seconds / expected, _LONGEST)
        self.step_weight += 1

    @property
    def factor(self) -> float:
        """Return by how much steps are dearer in plain tokens than measured, 1 without evidence.

        Where only steps were timed, plain tokens are taken to cost what was measured: if it is the
        machine that has slowed down, parking will show it.
        """
        step = (self.step_sum + _PRIOR) / (self.step_weight + _PRIOR)
        plain = (self.plain_sum + _PRIOR) / (self.plain_weight + _PRIOR)
        return min(max(step / plain, LOWEST), HIGHEST)

    def _fade(self) -> None:
        self.plain_sum *= _DECAY
        self.plain_weight *= _DECAY
        self.step_sum *= _DECAY
        self.step_weight *= _DECAY
