"""Parent-conditioned candidates: re-rank what a stream proposes, given the token it follows.

The paper's streams are marginals: stream 2 does not know which token stream 1 proposed, nor
stream 1 which root was chosen. For a parent token p with embedding row e_p, and the final
normed hidden state s of stream j,

    Δ(p, s) = W2 · silu(W1 · [ê_p ; ŝ]) + B·A·ê_p        x̂ = x / rms(x)

(a conditioner of two tokens sees the parent's own parent g as well, W1 · [ê_p ; ŝ ; ê_g])
and the logits of the stream's best candidates c gain E_c · Δ, renormalised over the probability
those candidates had together. An extension of ours, not in the paper; acceptance does not care
where candidates come from, so decoding stays exactly lossless.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import mlx.core as mx
import mlx.nn as nn

from ..model.backbone import Backbone

NUM_CANDIDATES = 32  # of a stream's best, the ones that are re-ranked
GROUP = 64  # neighbouring ids whose maximum is looked at first
NUM_GROUPS = 128  # at least NUM_CANDIDATES, the widest TreeSpec.branching
_EPSILON = 1e-6


@dataclass(frozen=True)
class Candidates:
    """The best candidates of each stream, without regard to a parent.

    ids: (γ, C) int32. log_probs: (γ, C) float32. hidden: (γ, h), the final normed states.
    """

    ids: mx.array
    log_probs: mx.array
    hidden: mx.array


def top_candidates(
    logits: mx.array, hidden: mx.array, count: int, *, in_order: bool = True
) -> Candidates:
    """Return the `count` best candidates of each stream from logits (γ, V), best first if `in_order`.

    In two rounds: the best `count` all lie in the `count` groups of neighbouring ids with the
    highest maxima, so only the best groups are looked into. Partitioning and normalising whole
    rows of a large vocabulary is many times slower; probabilities are therefore relative to the
    best `NUM_GROUPS` groups, which hold nearly all of a row's mass. They only rank drafts.
    """
    R, V = logits.shape
    count = min(count, V)
    groups: mx.array | None = None
    if V > 2 * GROUP * NUM_GROUPS:
        if missing := -V % GROUP:
            logits = mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf)
        by_group = logits.reshape(R, -1, GROUP)
        groups = mx.argpartition(by_group.max(axis=-1), kth=-NUM_GROUPS, axis=-1)[:, -NUM_GROUPS:]
        logits = mx.take_along_axis(by_group, groups[:, :, None], axis=1).reshape(R, -1)
    logits = logits.astype(mx.float32)
    if count == 1:
        top = mx.argmax(logits, axis=-1, keepdims=True)
    else:
        top = mx.argpartition(logits, kth=-count, axis=-1)[:, -count:]
    values = mx.take_along_axis(logits, top, axis=-1)
    if in_order and count > 1:
        order = mx.argsort(-values, axis=-1)
        values, top = (mx.take_along_axis(a, order, axis=-1) for a in (values, top))
    ids = top
    if groups is not None:
        # Only streams that overflowed to NaN choose padding: any token will do then.
        ids = _id_in_group(mx.take_along_axis(groups, top // GROUP, axis=-1), top)
        ids = mx.minimum(ids, V - 1) if V % GROUP else ids
    log_probs = values - mx.logsumexp(logits, axis=-1, keepdims=True)
    return Candidates(ids.view(mx.int32), log_probs, hidden)


@dataclass(frozen=True)
class Conditioner:
    """The correction's weights: mlp_in (m, 2h or 3h), mlp_out (h, m), lora_a (h, r), lora_b (r, h)."""

    mlp_in: mx.array
    mlp_out: mx.array
    lora_a: mx.array
    lora_b: mx.array

    @property
    def num_tokens(self) -> int:
        """Return how many tokens before a candidate the weights see, 1 or 2."""
        return self.mlp_in.shape[1] // self.mlp_out.shape[0] - 1

    @cached_property
    def by_source(self) -> BySource:
        """Return the weights by what they are multiplied with, laid out once for all steps."""
        h, r = self.lora_a.shape
        parts = [self.mlp_in[:, i * h : (i + 1) * h].T for i in range(1 + self.num_tokens)]
        nothing = mx.zeros((h, r), dtype=self.lora_a.dtype)
        of_token = [parts[0], self.lora_a, *(x for part in parts[2:] for x in (part, nothing))]
        return BySource(
            mx.concatenate(of_token, axis=1),
            mx.concatenate([parts[1], nothing], axis=1),
            mx.concatenate([self.mlp_out, self.lora_b.T], axis=1),
            mx.array(
                [column < self.mlp_out.shape[1] for column in range(self.mlp_out.shape[1] + r)]
            ),
        )

    def correction(
        self, parents: mx.array, hidden: mx.array, grandparents: mx.array | None = None
    ) -> mx.array:
        """Return Δ (W, h) for the parents' embedding rows (W, h) and one stream's state (h,).

        grandparents: embedding rows of the parents' parents (W, h), for a conditioner of two.
        """
        e = unit(parents)
        seen = [e, mx.broadcast_to(unit(hidden), e.shape)]
        if self.num_tokens > 1:
            assert grandparents is not None
            seen.append(unit(grandparents))
        mlp = nn.silu(mx.concatenate(seen, axis=-1) @ self.mlp_in.T) @ self.mlp_out.T
        return mlp + (e @ self.lora_a) @ self.lora_b


@dataclass(frozen=True)
class BySource:
    """W1 with A, and W2 with B, by what they are multiplied with; n = m + r columns each.

    of_token: (h, n), for a parent; behind them n more for a grandparent, if the weights see one.
    of_stream: (h, n). Where W1's part has no A beside it, there are zeros. out: (h, n), for the head
    rows of candidates. of_mlp: (n,) bool, which columns are W1's.
    """

    of_token: mx.array
    of_stream: mx.array
    out: mx.array
    of_mlp: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """Return all of them, for evaluation."""
        return [self.of_token, self.of_stream, self.out, self.of_mlp]


class ConditionedProposer:
    """Candidates of each level given their parents, as `tree.build` asks for them.

    What does not depend on the parent is computed once for all levels: the stream's half of W1,
    and E_c·W2 and E_c·B of every candidate, so that a level costs a few small products. A level's
    grandparents were the parents of the level above, and their products are those made there.
    """

    def __init__(self, conditioner: Conditioner, backbone: Backbone, marginal: Candidates) -> None:
        self.backbone = backbone
        self.marginal = marginal
        self.weights = conditioner.by_source
        self.of_stream = unit(marginal.hidden) @ self.weights.of_stream  # (γ, n)
        rows = backbone.head_rows(marginal.ids.reshape(-1))
        self.keys = (rows @ self.weights.out).reshape(*marginal.ids.shape, -1)  # (γ, C, n)
        # The candidates' mass is the same for every parent.
        self.mass = mx.logsumexp(marginal.log_probs, axis=-1)
        self.above: mx.array | None = None  # the products of the level above, (W, 2n)

    def _state(
        self,
        of_stream: mx.array,
        parents: mx.array,
        grandparents: mx.array,
        places: mx.array | None,
    ) -> mx.array:
        """Return what the candidates' `keys` are multiplied by, (W, n), after the level above.

        places: where in it each parent's own parent is, None for the same places; at the first level
        there is none above, and `grandparents` are looked up.
        """
        weights, n = self.weights, self.weights.out.shape[1]
        W, above = parents.shape[0], self.above
        of_mlp, of_stream = (mx.broadcast_to(a, (W, n)) for a in (weights.of_mlp, of_stream))
        if weights.of_token.shape[1] == n:
            return _activated(of_mlp, self._products(parents), of_stream)
        if above is None:
            both = self._products(mx.concatenate([grandparents, parents]))
            above, products, places = both[:-W], both[-W:], None
        else:
            products = self._products(parents)
        self.above = products
        above = above[:, n:]
        if places is not None and above.shape[0] > 1:
            above = mx.take(above, places, axis=0)
        return _activated(of_mlp, products[:, :n], of_stream, mx.broadcast_to(above, (W, n)))

    def _products(self, tokens: mx.array) -> mx.array:
        """Return what W1 and A make of tokens (W,), (W, n) or (W, 2n)."""
        return unit(self.backbone.embedding_rows(tokens)) @ self.weights.of_token

    def __call__(
        self, level: int, parents: mx.array, grandparents: mx.array, places: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return candidates (W, C) int32 and log-probabilities (W, C), in any order."""
        if level == 0:  # a tree may be grown twice
            self.above = None
        state = self._state(at(self.of_stream, level), parents, grandparents, places)
        gain = state @ at(self.keys, level).T
        scores = _raised(mx.broadcast_to(at(self.marginal.log_probs, level), gain.shape), gain)
        total = mx.logsumexp(scores, axis=-1, keepdims=True)
        log_probs = _normalised(scores, at(self.mass, level), total)
        return mx.broadcast_to(at(self.marginal.ids, level), scores.shape), log_probs

    def best(
        self, level: int, rows: mx.array, parents: mx.array, grandparents: mx.array
    ) -> mx.array:
        """Return the best candidate (W,) int32 of each parent (W,); `rows` as in `ranked`."""
        ids, scores = self._scores(level, rows, parents, grandparents)
        best = mx.argmax(scores, axis=-1, keepdims=True)
        return mx.take_along_axis(ids, best, axis=-1)[:, 0]

    def ranked(
        self, level: int, rows: mx.array, parents: mx.array, grandparents: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return candidates (W, C) int32 and log-probabilities of each parent at a stream of its own.

        rows: (W,) int32, which row of the marginals each parent asks; chains of a batch have a
        row per sequence and stream. Called level by level: the parents' parents are those of the
        call before, and `grandparents` are looked up in the first.
        """
        ids, scores = self._scores(level, rows, parents, grandparents)
        total = mx.logsumexp(scores, axis=-1, keepdims=True)
        return ids, _normalised(scores, mx.take(self.mass, rows)[:, None], total)

    def _scores(
        self, level: int, rows: mx.array, parents: mx.array, grandparents: mx.array
    ) -> tuple[mx.array, mx.array]:
        if level == 0:  # chains may be drafted twice
            self.above = None
        state = self._state(mx.take(self.of_stream, rows, axis=0), parents, grandparents, None)
        gain = (mx.take(self.keys, rows, axis=0) @ state[:, :, None]).squeeze(-1)
        scores = _raised(mx.take(self.marginal.log_probs, rows, axis=0), gain)
        return mx.take(self.marginal.ids, rows, axis=0), scores


class MarginalProposer:
    """The paper's candidates: the same for every parent."""

    def __init__(self, marginal: Candidates) -> None:
        self.marginal = marginal

    def __call__(
        self, level: int, parents: mx.array, grandparents: mx.array, places: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return candidates (W, C) int32 and log-probabilities (W, C), best first."""
        del grandparents, places
        shape = (parents.shape[0], self.marginal.ids.shape[1])
        ids, log_probs = at(self.marginal.ids, level), at(self.marginal.log_probs, level)
        return mx.broadcast_to(ids, shape), mx.broadcast_to(log_probs, shape)


@partial(mx.compile, shapeless=True)
def _activated(of_mlp: mx.array, *parts: mx.array) -> mx.array:
    """Return the sum of `parts`, through silu where `of_mlp` says so."""
    total = sum(parts[1:], parts[0])
    return mx.where(of_mlp, nn.silu(total), total)


@partial(mx.compile, shapeless=True)
def _raised(log_probs: mx.array, gain: mx.array) -> mx.array:
    return log_probs + gain.astype(mx.float32)


@partial(mx.compile, shapeless=True)
def _id_in_group(group: mx.array, within: mx.array) -> mx.array:
    return group * GROUP + within % GROUP


@partial(mx.compile, shapeless=True)
def _normalised(scores: mx.array, mass: mx.array, total: mx.array) -> mx.array:
    return scores + (mass - total)


def at(array: mx.array, row: int) -> mx.array:
    """Return a row as a view; `array[row]` would start a kernel to copy it."""
    return array[row : row + 1].squeeze(0)


def unit(x: mx.array) -> mx.array:
    """Return x (..., h) divided by its root mean square."""
    return mx.fast.rms_norm(x, None, _EPSILON)
