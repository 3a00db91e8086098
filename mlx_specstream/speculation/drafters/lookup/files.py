"""Files to look things up in, beside the text itself: an index that is made once and not changed.

Places are sorted by the tokens before them, read backwards, so those that match the text's end furthest
are neighbours of where that end would stand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .text import Occurrence, matching

BITS = 21  # per token in a key; vocabularies are smaller
PER_KEY = 3
PLACES = 8  # that are looked at


class FileIndex:
    """The tokens of some files, one after another."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        values = np.asarray(self.tokens, dtype=np.uint64)
        near, far = _keys(values, 0), _keys(values, PER_KEY)
        self.order = np.lexsort((far, near)).astype(np.int64)
        self.near, self.far = near[self.order], far[self.order]

    def occurrences(self, text: Sequence[int]) -> list[Occurrence]:
        """Return places where the last three tokens of `text` stand, those that match furthest."""
        if len(text) < PER_KEY or not self.tokens:
            return []
        end = np.asarray(text[-2 * PER_KEY :], dtype=np.uint64)
        near, far = _keys(end, 0)[-1], _keys(end, PER_KEY)[-1]
        first = int(np.searchsorted(self.near, near, side="left"))
        last = int(np.searchsorted(self.near, near, side="right"))
        here = first + int(np.searchsorted(self.far[first:last], far))
        around = range(max(first, here - PLACES // 2), min(last, here + PLACES))
        ends = list(text)
        found = []
        for place in around:
            at = int(self.order[place])
            length = matching(self.tokens, at, ends)
            if length >= PER_KEY:
                found.append(Occurrence(self.tokens, at + 1, 0, length))
        return sorted(found, key=lambda one: -one.length)[:PLACES]


def _keys(values: np.ndarray, skip: int) -> np.ndarray:
    """Return, for every place, the three tokens before the last `skip` ones as one number."""
    keys = np.zeros(len(values), dtype=np.uint64)
    for back in range(skip, skip + PER_KEY):
        shift = np.uint64(BITS * (PER_KEY - 1 - back + skip))
        earlier = np.zeros(len(values), dtype=np.uint64)
        if back < len(values):
            earlier[back:] = values[: len(values) - back] + np.uint64(1)
        keys |= earlier << shift
    return keys
