"""How often looked-up continuations are right, learnt from every token that is drawn.

Occurrences are grouped by the length of their match, longest first. With the chance of its kind the
next token is among those that a group proposes, in proportion to how often each followed; if not, the
next group is asked. Kinds differ by length and by how many occurrences agree.

A token tells about the groups at its place whether or not anything was verified there, so what is
learnt does not depend on what was drafted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .text import Occurrence

LENGTHS = (1, 2, 3, 4, 5, 7, 10, 15, 24)  # where the classes of match lengths begin
PRIOR = (0.12, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93)
PRIOR_WEIGHT = 6.0  # of the prior, in tokens
MEMORY = 60.0  # tokens of a kind that count; older ones fade
KEPT = 0.5  # of what was learnt, when another answer begins
AGREEMENTS = 3  # one occurrence; several that agree; several that do not


@dataclass(frozen=True)
class Group:
    """Occurrences of one class of lengths: its kind, and how often each token followed."""

    kind: int
    counts: dict[int, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def groups(occurrences: Sequence[Occurrence]) -> list[Group]:
    """Return the groups of occurrences, longest matches first. Ends of other texts are left out."""
    by_class: dict[int, dict[int, int]] = {}
    for occurrence in occurrences:
        token = occurrence.follows()
        if token is not None:
            counts = by_class.setdefault(bisect_right(LENGTHS, occurrence.length) - 1, {})
            counts[token] = counts.get(token, 0) + 1
    return [
        Group(AGREEMENTS * number + _agreement(counts), counts)
        for number, counts in sorted(by_class.items(), reverse=True)
    ]


def _agreement(counts: dict[int, int]) -> int:
    if len(counts) > 1:
        return 2
    return 0 if sum(counts.values()) == 1 else 1


@dataclass
class Calibration:
    """Of each kind of group: how often it was asked, and how often it was right."""

    asked: list[float] = field(default_factory=lambda: [0.0] * len(LENGTHS) * AGREEMENTS)
    right: list[float] = field(default_factory=lambda: [0.0] * len(LENGTHS) * AGREEMENTS)

    def chance(self, kind: int) -> float:
        """Return the probability that a group of a kind is right."""
        right = self.right[kind] + PRIOR_WEIGHT * PRIOR[kind // AGREEMENTS]
        return right / (self.asked[kind] + PRIOR_WEIGHT)

    def learn(self, found: Sequence[Group], token: int) -> None:
        """Take in the token that was drawn where `found` was proposed."""
        for group in found:
            hit = token in group.counts
            kept = 1 - 1 / MEMORY
            self.asked[group.kind] = kept * self.asked[group.kind] + 1
            self.right[group.kind] = kept * self.right[group.kind] + hit
            if hit:
                return

    def fade(self) -> None:
        """Trust the past less: another answer begins."""
        self.asked = [KEPT * value for value in self.asked]
        self.right = [KEPT * value for value in self.right]

    def chances(self, found: Sequence[Group]) -> Iterator[tuple[int, float]]:
        """Yield tokens and parts of their probabilities, which add up where groups name the same."""
        left = 1.0
        for group in found:
            chance, total = self.chance(group.kind), group.total
            for token, count in group.counts.items():
                yield token, left * chance * count / total
            left *= 1 - chance
