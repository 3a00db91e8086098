"""The outlook: what the next steps are worth, by the probabilities the streams give their own drafts.

Before a drafted tree is verified, the sum of its nodes' path probabilities says how many drafts
will be accepted. That tells more than the steps before did: an answer changes from token to token.
It is corrected by what was accepted of what was expected, and smoothed into a level that says
whether the text goes on like that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SMOOTHING = 0.3  # weight of the newest expectation in the level
KEPT = 0.3  # of the level, when another answer begins
_DECAY = 0.99  # of the counts behind the correction, per step
_PRIOR_DRAFTS = 20.0  # expected drafts that the initial correction is worth
_INITIAL = 0.9  # accepted per expected draft


@dataclass
class Outlook:
    """Expected drafts per step, corrected and smoothed.

    level: the smoothed expectation, None before the first.
    """

    level: float | None = None
    _expected: float = _PRIOR_DRAFTS
    _accepted: float = field(default=_INITIAL * _PRIOR_DRAFTS)

    def begin(self, assumed: float) -> None:
        """Begin another answer, of which `assumed` accepted drafts per step are expected."""
        self.level = assumed if self.level is None else KEPT * self.level + (1 - KEPT) * assumed

    def corrected(self, expected: float) -> float:
        """Return what a tree's own expectation is worth."""
        return expected * self._accepted / self._expected

    def see(self, expected: float) -> float:
        """Take in the expectation of a tree that was drafted; return it corrected."""
        worth = self.corrected(expected)
        self.level = worth if self.level is None else self.level + SMOOTHING * (worth - self.level)
        return worth

    def verified(self, expected: float, accepted: int) -> None:
        """Take in what a step accepted of a tree with that expectation."""
        self._expected = _PRIOR_DRAFTS + _DECAY * (self._expected - _PRIOR_DRAFTS) + expected
        prior = _INITIAL * _PRIOR_DRAFTS
        self._accepted = prior + _DECAY * (self._accepted - prior) + accepted
