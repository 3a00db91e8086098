"""Acceptance as it is here and now: how far the text at hand is from the recorded.

One number, added to the log-odds of every acceptance that was recorded: below 0 the text is
harder. It is the likeliest under what recent steps accepted, weighed against 0 (the records) by
a normal prior; being one number for all trees, it says of those that are not in use what those
in use have shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .acceptance import Rates

DECAY = 0.97  # per step: about 33 steps are remembered
PRIOR_WEIGHT = 2.0  # 1 over the prior's variance: texts differ by some 0.7
LIMIT = 4.0


@dataclass
class LiveAcceptance:
    """Decayed counts of recent steps: per kind of tree and depth, tries and hits."""

    tries: dict[Rates, list[float]] = field(default_factory=dict)
    hits: dict[Rates, list[float]] = field(default_factory=dict)

    def observe(self, rates: Rates, accepted: int) -> None:
        """Take in a step whose tree was expected to be accepted at `rates`."""
        for counts in (*self.tries.values(), *self.hits.values()):
            for level in range(len(counts)):
                counts[level] *= DECAY
        depth = len(rates.chances)
        tries = self.tries.setdefault(rates, [0.0] * depth)
        hits = self.hits.setdefault(rates, [0.0] * depth)
        for level in range(min(accepted + 1, depth)):
            tries[level] += 1.0
            hits[level] += float(level < accepted)

    def fade(self, share: float) -> None:
        """Forget all but `share` of what was seen: another text begins."""
        for counts in (*self.tries.values(), *self.hits.values()):
            counts[:] = [share * count for count in counts]

    @property
    def steps(self) -> float:
        """Return how many steps are remembered."""
        return sum(tries[0] for tries in self.tries.values() if tries)

    def shift(self) -> float:
        """Return the likeliest shift of log-odds, by a few of Newton's steps."""
        shift = 0.0
        for _ in range(6):
            slope, curvature = -PRIOR_WEIGHT * shift, PRIOR_WEIGHT
            for rates, tries in self.tries.items():
                hits = self.hits[rates]
                for level, chance in enumerate(rates.shifted(shift)):
                    slope += hits[level] - tries[level] * chance
                    curvature += tries[level] * chance * (1 - chance)
            move = slope / curvature
            shift = min(max(shift + min(max(move, -1.0), 1.0), -LIMIT), LIMIT)
            if abs(move) < 1e-3:
                break
        return shift
