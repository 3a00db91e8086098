"""The chains that a pass verifies: what streams drafted, what look-up found, or both in one.

    streams      root ─ s1 ─ s2
    look-up      root ─ a ─ b ─ c ─ d         both   root ─ a ─ s2     or   root ─ a ─ b ─ c ─ d
    just joined  root

At every level the likelier of both goes on, by the rule that trees are merged by
(`drafters/lookup/merge.py`); below the streams' last level look-up goes on alone, where the chain is
still its own. All chains of a pass are as long as the longest: a shorter one is filled up with its
root, and no token that fills up is ever accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from ..model.backbone import Backbone
from ..speculation.condition import (
    NUM_CANDIDATES,
    Candidates,
    ConditionedProposer,
    Conditioner,
    top_candidates,
)
from ..speculation.drafters.lookup import Continuations, MergedProposer
from ..speculation.tree import Proposer


@dataclass(frozen=True)
class Chains:
    """What a pass verifies for B sequences.

    tokens: (B, T) int32, each row a root and its drafts. lengths: how many of each row's tokens are
    root and drafts; the others fill up. alive: (B, T) bool, which of those may be accepted, None for
    all. looked_up: (B, T) bool, which of them look-up was surer of than streams, None for none.
    """

    tokens: mx.array
    lengths: list[int]
    alive: mx.array | None = None
    looked_up: mx.array | None = None

    @property
    def num_drafts(self) -> list[int]:
        return [length - 1 for length in self.lengths]

    def real(self) -> mx.array | None:
        """Return which tokens may be accepted, (B, T) bool; None for all."""
        T = self.tokens.shape[1]
        if min(self.lengths) == T:
            return self.alive
        ends = mx.array(self.lengths, dtype=mx.int32)[:, None]
        real = mx.arange(T, dtype=mx.int32) < ends
        return real if self.alive is None else real & self.alive

    def filled_up(self, T: int) -> Chains:
        """Return the same chains `T` tokens long."""
        more = T - self.tokens.shape[1]
        if more == 0:
            return self

        def wider(flags: mx.array | None) -> mx.array | None:
            return None if flags is None else mx.pad(flags, [(0, 0), (0, more)])

        roots = mx.broadcast_to(self.tokens[:, :1], (len(self.lengths), more))
        tokens = mx.concatenate([self.tokens, roots], axis=1)
        return Chains(tokens, self.lengths, wider(self.alive), wider(self.looked_up))

    def take(self, rows: Sequence[int]) -> Chains:
        """Return the chains of these rows in this order."""
        if list(rows) == list(range(len(self.lengths))):
            return self
        index = mx.array(list(rows), dtype=mx.int32)
        tokens, alive, looked_up = (
            None if part is None else mx.take(part, index, axis=0)
            for part in (self.tokens, self.alive, self.looked_up)
        )
        assert tokens is not None
        return Chains(tokens, [self.lengths[row] for row in rows], alive, looked_up)

    def beside(self, others: Chains) -> Chains:
        """Return these chains, then the others."""
        T = max(self.tokens.shape[1], others.tokens.shape[1])
        one, two = self.filled_up(T), others.filled_up(T)

        def both(
            mine: mx.array | None, theirs: mx.array | None, *, default: bool
        ) -> mx.array | None:
            if mine is None and theirs is None:
                return None
            parts = [
                mx.full((len(of.lengths), T), default) if flags is None else flags
                for flags, of in ((mine, one), (theirs, two))
            ]
            return mx.concatenate(parts)

        return Chains(
            mx.concatenate([one.tokens, two.tokens]),
            one.lengths + two.lengths,
            both(one.alive, two.alive, default=True),
            both(one.looked_up, two.looked_up, default=False),
        )


def looked_up_chains(roots: Sequence[int], found: Sequence[Continuations]) -> Chains:
    """Return roots with what look-up found below them, nothing where that is empty."""
    lengths = [1 + len(one) for one in found]
    T = max(lengths)
    rows = [
        [root, *one.tokens, *[root] * (T - length)]
        for root, one, length in zip(roots, found, lengths, strict=True)
    ]
    looked_up = None
    if T > 1:
        looked_up = mx.broadcast_to(mx.arange(T) > 0, (len(rows), T))
    return Chains(mx.array(rows, dtype=mx.int32), lengths, looked_up=looked_up)


def merged_chains(
    roots: mx.array,
    before: mx.array,
    levels: int,
    propose: Proposer,
    found: Sequence[Continuations],
) -> Chains:
    """Return chains of another drafter's candidates and look-up's.

    Args:
        roots, before: (B,) int32, the chains' first tokens and those that they follow.
        levels: of the other drafter, at least 1.
        propose: its candidates; parent b of every level is in chain b.
        found: of each sequence, a chain or nothing.
    """
    B = len(found)
    merged = MergedProposer(propose, found)
    places = mx.arange(B, dtype=mx.int32)
    tokens, parents = [roots], roots
    for level in range(levels):
        ids, log_probs = merged(level, parents, before, places)
        best = mx.argmax(log_probs, axis=1, keepdims=True)
        before, parents = parents, mx.take_along_axis(ids, best, axis=1)[:, 0]
        tokens.append(parents)
    rows = mx.stack([*merged.rows, merged.descend(parents, places)], axis=1)
    looked_up = merged.is_looked_up(rows)
    lengths = [max(1 + levels, 1 + len(one)) for one in found]
    drafted, deep = mx.stack(tokens, axis=1), max(lengths) - 1 - levels
    if not deep:
        return Chains(drafted, lengths, None, looked_up)
    tails = [one.tokens[levels:] for one in found]
    tail = mx.array([[*tail, *[0] * (deep - len(tail))] for tail in tails], dtype=mx.int32)
    # Where a chain left what was looked up, the rest of that follows nothing.
    ends = mx.array([first + levels - 1 for first in merged.first[:-1]], dtype=mx.int32)
    goes_on = mx.array([[n < len(tail) for n in range(deep)] for tail in tails])
    goes_on = goes_on & (rows[:, -1] == ends)[:, None]
    alive = mx.concatenate([mx.ones(drafted.shape, dtype=mx.bool_), goes_on], axis=1)
    return Chains(
        mx.concatenate([drafted, mx.where(goes_on, tail, roots[:, None])], axis=1),
        lengths,
        alive,
        mx.concatenate([looked_up, goes_on], axis=1),
    )


@dataclass(frozen=True)
class ChainCandidates:
    """Candidates of chains of a batch, level by level: each chain's from its sequence's own streams.

    logits: (B, D, V) and normed: (B, D, h), of the streams after the final norm.
    """

    backbone: Backbone
    conditioner: Conditioner | None
    logits: mx.array
    normed: mx.array

    @cached_property
    def likeliest(self) -> mx.array:
        """Return each stream's likeliest token, (B, D) int32."""
        return mx.argmax(self.logits, axis=-1).astype(mx.int32)

    @cached_property
    def marginal(self) -> Candidates:
        """Return each stream's best candidates in any order, D rows per sequence."""
        rows = self.logits.shape[0] * self.logits.shape[1]
        logits, hidden = (part.reshape(rows, -1) for part in (self.logits, self.normed))
        return top_candidates(logits, hidden, NUM_CANDIDATES, in_order=False)

    @cached_property
    def conditioned(self) -> ConditionedProposer | None:
        if self.conditioner is None:
            return None
        return ConditionedProposer(self.conditioner, self.backbone, self.marginal)

    def best(
        self, level: int, sequences: mx.array, parents: mx.array, before: mx.array
    ) -> mx.array:
        """Return the likeliest token (W,) int32 after `parents` of these sequences, all (W,)."""
        if self.conditioned is None:
            return mx.take(self.likeliest[:, level], sequences)
        return self.conditioned.best(level, self._rows(level, sequences), parents, before)

    def ranked(
        self, level: int, sequences: mx.array, parents: mx.array, before: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return candidates (W, C) int32 and their log-probabilities, in any order."""
        rows = self._rows(level, sequences)
        if self.conditioned is None:
            ids, log_probs = self.marginal.ids, self.marginal.log_probs
            return mx.take(ids, rows, axis=0), mx.take(log_probs, rows, axis=0)
        return self.conditioned.ranked(level, rows, parents, before)

    def _rows(self, level: int, sequences: mx.array) -> mx.array:
        return sequences * self.logits.shape[1] + level
