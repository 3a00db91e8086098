"""Drafters that read their own drafts: each level's nodes propose the next level.

    own rows   0 .......... n | the accepted path, padded | level 1 | level 2 | ...
               committed text | P = depth + 1 rows        | W rows  | W rows

The path's last row that counts proposes the first level. A level's nodes see the text, the path,
their ancestors and themselves.
"""

from __future__ import annotations

from abc import abstractmethod

import mlx.core as mx

from ...config import TreeSpec
from ...model.cache import KVCache
from ...model.masks import RowMask
from ..accept import AcceptedPath
from ..condition import top_candidates
from ..tree import Proposer
from .drafter import Verified
from .own_rows import OwnRowsDrafter, RowPlace


class UnrolledDrafter(OwnRowsDrafter):
    """A drafter whose network reads drafts as it reads the text."""

    @abstractmethod
    def logits(self, states: mx.array) -> mx.array:
        """Return logits (R, V') of states (1, R, h)."""

    def token_ids(self, ids: mx.array) -> mx.array:
        """Return the base's token ids for columns of `logits`."""
        return ids

    def propose(
        self, verified: Verified, path: AcceptedPath, cache: KVCache, spec: TreeSpec
    ) -> Proposer:
        """Read the accepted path and return what grows a tree below it, a level at a time."""
        own, states, start = self.read_path(verified, path, cache)
        last = mx.take(states, path.length.reshape(1), axis=1)
        counts = mx.arange(states.shape[1], dtype=mx.int32) <= path.length
        end = start + path.length
        return Unrolling(self, own.kv, spec.branching, last, counts, start, end)


class Unrolling:
    """The candidates of a step, level by level, each from the rows of the level before.

    states: (1, 1, h), of the path's last row. counts: (P,) bool, which of the path's rows count.
    start: where the path's rows begin in `kv`. end: () int32, the position of the last that counts.
    """

    def __init__(
        self,
        drafter: UnrolledDrafter,
        kv: KVCache,
        branching: int,
        states: mx.array,
        counts: mx.array,
        start: int,
        end: mx.array,
    ) -> None:
        self.drafter, self.kv, self.branching = drafter, kv, branching
        self.end = end
        prefix = mx.ones((start,), dtype=mx.bool_)
        # Of the level above: its states (1, W, h), whom its nodes see (W, S), the keys' positions.
        self.states, self.seen = states, mx.concatenate([prefix, counts])[None]
        self.keys = mx.arange(start + counts.shape[0], dtype=mx.int32)
        self.path = self.states, self.seen, self.keys

    def __call__(
        self, level: int, parents: mx.array, before: mx.array, places: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return candidates (W, k) int32 and log-probabilities (W, k) float32."""
        del before
        if level:
            self._read(level, parents, places)
        else:  # a tree may be grown twice, the second time with what look-up found
            self.states, self.seen, self.keys = self.path
        logits = self.drafter.logits(self.states)
        top = top_candidates(logits, self.states[0], self.branching)
        return self.drafter.token_ids(top.ids), top.log_probs

    def _read(self, level: int, nodes: mx.array, places: mx.array) -> None:
        """Run the network over a level's nodes (W,), given under which of the level above each is."""
        W, start = nodes.shape[0], self.keys.shape[0]
        above = mx.take(self.seen, places, axis=0)
        self.seen = mx.concatenate([above, mx.eye(W, dtype=mx.bool_)], axis=1)
        positions = mx.broadcast_to(self.end + level, (W,)).astype(mx.int32)
        self.keys = keys = mx.concatenate([self.keys, positions])
        mask = RowMask(self.seen, lambda: (positions, keys))
        features = mx.take(self.states, places, axis=1)
        place = RowPlace(self.kv, start, positions, mask)
        self.states = self.drafter.read_rows(nodes, features, place)
