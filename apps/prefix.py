"""A KV cache that knows which tokens its rows are, so that only what changed is computed.

    cached   the sky is | blue because ...
    wanted   the sky is | green? No, ...
             └ reused ┘ └ rewound; the rest is for the caller to compute

Tokens decide, never text: a chat template may rewrite earlier turns, and text cut into tokens
again need not give the tokens that were generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_specstream import KVCache


@dataclass
class PrefixCache:
    """A KV cache with the token of every row; `tokens` has `kv.length` entries."""

    kv: KVCache
    tokens: list[int] = field(default_factory=list)

    def reuse(self, ids: Sequence[int]) -> list[int]:
        """Rewind to what `ids` shares with the cache and return the rest of `ids`, never nothing.

        The last token is always left to the caller: decoding starts from it. Where a model's
        layers forget (sliding windows, states), less is shared, and perhaps nothing.
        """
        shared = self.kv.nearest(min(common_prefix(self.tokens, ids), len(ids) - 1))
        if self.kv.can_rewind(shared):
            self.kv.rewind(shared)
        else:
            self.kv = self.kv.fresh()
        del self.tokens[shared:]
        return list(ids[shared:])

    def settle(self, ids: Sequence[int]) -> None:
        """Note that the rows now hold the beginning of `ids`, as far as they go."""
        assert self.kv.length <= len(ids)
        self.tokens = list(ids[: self.kv.length])

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.kv = self.kv.fresh()
        self.tokens = []

    def fork(self, length: int) -> KVCache:
        """Return a copy of the first `length` rows, to decode in without touching this cache."""
        return self.kv.copy(length)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences of one type share from their beginning.

    By halving, so that slices are compared and not tokens: contexts are long.
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
