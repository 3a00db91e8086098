"""KV caches of earlier requests, for later ones that begin with the same tokens.

Bound in bytes; what was used longest ago goes first. A request that continues a stored text gets
that cache itself; one that shares only a beginning gets a copy of its rows, for a cache is
written to while it is decoded in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ... import KVCache
from ...machine import ranks
from ..prefix import PrefixCache, common_prefix


class PrefixStore:
    """Caches of text nobody decodes in at the moment, the longest unused one first."""

    def __init__(self, new_cache: Callable[[], KVCache], max_bytes: int) -> None:
        self.new_cache = new_cache
        self.max_bytes = max_bytes
        self.entries: list[PrefixCache] = []

    @property
    def nbytes(self) -> int:
        """Return the bytes of all stored caches."""
        return sum(entry.kv.nbytes for entry in self.entries)

    def take(self, ids: Sequence[int]) -> PrefixCache:
        """Return a cache to decode `ids` in, which holds their beginning but never all."""
        shared, best = 0, None
        for entry in self.entries:
            # Sliding windows and states forget; what cannot go back to the common text is of no use.
            common = entry.kv.nearest(min(common_prefix(entry.tokens, ids), len(ids) - 1))
            if common > shared and entry.kv.can_rewind(common):
                shared, best = common, entry
        if best is None:
            return PrefixCache(self.new_cache())
        self.entries.remove(best)
        if shared == len(best.tokens):
            return best
        self.entries.append(best)
        return PrefixCache(best.kv.copy(shared), list(ids[:shared]))

    def put(self, cache: PrefixCache) -> None:
        """Store a cache, in place of those whose text it begins with, and forget the oldest."""
        if not cache.tokens:
            return
        for entry in list(self.entries):
            common = common_prefix(entry.tokens, cache.tokens)
            if common == len(cache.tokens):  # nothing new
                self.entries.remove(entry)
                self.entries.append(entry)
                return
            if common == len(entry.tokens):
                self.entries.remove(entry)
        self.entries.append(cache)
        del self.entries[: self._excess()]

    def _excess(self) -> int:
        """Return how many of the oldest must go; among processes, as many as the leader must.

        Those hold layers of their own, of which some take more bytes than others.
        """
        total, excess = self.nbytes, 0
        for entry in self.entries:
            if total <= self.max_bytes:
                break
            total, excess = total - entry.kv.nbytes, excess + 1
        return int(ranks.told(str(excess).encode()))

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
