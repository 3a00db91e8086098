"""What may follow, as a tree on the host: looked-up continuations with their probabilities.

Occurrences that go on alike share a path; where they part, it branches. The likeliest nodes come
first, whatever their depth, so a long match gives a long chain and several short ones a bush.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .calibration import Calibration, groups
from .text import Occurrence

LEAST = 0.05  # probability of a path that is worth a node


@dataclass(frozen=True)
class Continuations:
    """Nodes below the text's end, likeliest first; a node's parent comes before it.

    tokens, depths: of each node; depths begin at 1. parents: indices of nodes, -1 at depth 1.
    chances: that the text goes on along the path to the node. given: the same, given its parent.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    chances: list[float]
    given: list[float]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def none(cls) -> Continuations:
        """Return no nodes."""
        return cls([], [], [], [], [])

    def first(self, count: int) -> Continuations:
        """Return the `count` likeliest nodes."""
        return Continuations(
            self.tokens[:count],
            self.parents[:count],
            self.depths[:count],
            self.chances[:count],
            self.given[:count],
        )

    def expected(self, count: int) -> float:
        """Return how many of the `count` likeliest nodes should be right."""
        return sum(self.chances[:count])


def continuations(
    occurrences: Sequence[Occurrence],
    calibration: Calibration,
    count: int,
    depth: int,
    *,
    chain: bool = False,
    least: float = LEAST,
) -> Continuations:
    """Return at most `count` nodes, `depth` deep, of what followed the occurrences.

    chain: of every node's children the likeliest alone. least: the lowest probability of a node.
    """
    found = Continuations.none()
    # (-chance, order, token, parent, depth, chance given the parent, occurrences there)
    heap: list[tuple[float, int, int, int, int, float, list[Occurrence]]] = []
    order = 0

    def offer(here: Sequence[Occurrence], parent: int, level: int, reached: float) -> None:
        nonlocal order
        chances: dict[int, float] = {}
        for token, part in calibration.chances(groups(here)):
            chances[token] = chances.get(token, 0.0) + part
        best = max(chances, key=chances.__getitem__, default=None)
        for token, given in chances.items():
            chance = reached * given
            if chance < least or (chain and token != best):
                continue
            on = [one.after() for one in here if one.follows() == token]
            heapq.heappush(heap, (-chance, order, token, parent, level, given, on))
            order += 1

    if count > 0 and depth > 0:
        offer(occurrences, -1, 1, 1.0)
    while heap and len(found) < count:
        chance, _, token, parent, level, given, on = heapq.heappop(heap)
        found.tokens.append(token)
        found.parents.append(parent)
        found.depths.append(level)
        found.chances.append(-chance)
        found.given.append(given)
        if level < depth:
            offer(on, len(found) - 1, level + 1, -chance)
    return found


def log(chance: float) -> float:
    """Return the logarithm of a probability."""
    return math.log(max(chance, 1e-30))
