"""Layers divided among processes, one stretch each: a pass goes through them in turn.

    rank 0    embed ── layers 0..14 ──┐                      ┌── norm, head, acceptance
    rank 1    embed                   └── layers 15..29 ─────┴── norm, head, acceptance

Each process holds the weights and the KV caches of its own layers. At the end of a stretch every
process gets its hidden states, bit for bit, so that all of them draw the same tokens and build the
same tree; a pass costs one message per stretch, of rows x hidden size numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Stages:
    """Who runs which layers. group: None if this process runs all of them.

    ends: the layer behind the last one of each process.
    """

    ends: tuple[int, ...]
    rank: int = 0
    group: mx.distributed.Group | None = None

    @classmethod
    def alone(cls, num_layers: int) -> Stages:
        """Return all layers in this process."""
        return cls((num_layers,))

    @classmethod
    def even(cls, num_layers: int, group: mx.distributed.Group) -> Stages:
        """Return stretches of nearly the same length."""
        N = group.size()
        ends = tuple(round(num_layers * (rank + 1) / N) for rank in range(N))
        return cls(ends, group.rank(), group)

    @property
    def own(self) -> range:
        """Return the layers that this process runs."""
        first = self.ends[self.rank - 1] if self.rank else 0
        return range(first, self.ends[self.rank])

    def split(self, layers: range) -> Iterator[tuple[range, int]]:
        """Yield the stretches of `layers`, a part of each process's, and whose they are."""
        first = 0
        for rank, end in enumerate(self.ends):
            part = range(max(first, layers.start), min(end, layers.stop))
            if len(part):
                yield part, rank
            first = end

    def shared(self, hidden: mx.array, owner: int) -> mx.array:
        """Return the hidden states that process `owner` has computed, in every process."""
        if self.group is None:
            return hidden
        if owner != self.rank:
            # What it says is nothing, but said in its turn: messages have no names.
            (hidden,) = mx.depends([mx.zeros(hidden.shape, dtype=hidden.dtype)], [hidden])
        return mx.distributed.all_sum(hidden, group=self.group)
