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

from .. import KVCache
from ..config import CacheConfig
from ..model.backbone import Backbone

SLACK = 2048  # rows of sliding-window layers to keep out of sight, for edits and new attempts


@dataclass
class PrefixCache:
    """A KV cache with the token of every row; `tokens` has `kv.length` entries.

    `following` is the token behind them, if a step has drawn it.
    """

    kv: KVCache
    tokens: list[int] = field(default_factory=list)
    following: int | None = None

    @classmethod
    def for_model(cls, backbone: Backbone, config: CacheConfig | None = None) -> PrefixCache:
        """Return a cache without rows of the kind that model and config ask for.

        Raises:
            OptionError: the config does not fit the model.
        """
        return cls(backbone.new_cache(config, slack=SLACK))

    def reuse(self, ids: Sequence[int]) -> list[int]:
        """Rewind to what `ids` shares with the cache and return the rest of `ids`, never nothing.

        The last token is always left to the caller: decoding starts from it. Where a model's
        layers forget (sliding windows, states), less is shared, and perhaps nothing.
        """
        shared = min(common_prefix(self.tokens, ids), len(ids) - 1)
        if shared < self.kv.length or ids[shared] != self.following:
            shared = self._reached(shared)
            # A cache whose rows depend on passes begins anew as it began: unquantised.
            if shared or (self.kv.can_rewind(0) and not self.kv.depends_on_passes):
                self.kv.rewind(shared)
                del self.tokens[shared:]
                self.following = None
            else:
                self.reset()
        return list(ids[shared:])

    def _reached(self, length: int) -> int:
        """Return how many rows, `length` at most, can be gone on from with any text.

        Once a window with first rows that stay has moved, rows depend on the passes that made
        them, and mlx-lm does not trim such a cache either; quantised ones it does trim.
        """
        moved = any(
            layer.depends_on_passes and layer.span is not None and layer.span.wrapped
            for layer in self.kv.layers
        )
        return 0 if moved else self.kv.nearest(length)

    def settle(self, ids: Sequence[int]) -> None:
        """Note that the rows now hold the beginning of `ids`, as far as they go."""
        length = self.kv.length
        assert length <= len(ids)
        self.tokens = list(ids[:length])
        drawn = self.kv.next_is_generated and length < len(ids)
        self.following = ids[length] if drawn else None

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.kv = self.kv.fresh()
        self.tokens, self.following = [], None

    def fork(self, length: int) -> KVCache:
        """Return a copy of the first `length` rows, to decode in without touching this cache.

        Of fewer rows where older ones are gone, and perhaps of none.
        """
        reached = self._reached(length)
        return self.kv.copy(reached) if reached else self.kv.fresh()


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
