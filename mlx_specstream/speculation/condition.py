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
_WITHIN_GROUP = mx.array(list(range(GROUP)))


@dataclass(frozen=True)
class Candidates:
    """The best candidates of each stream, without regard to a parent, best first.

    ids: (γ, C) int32. log_probs: (γ, C) float32. hidden: (γ, h), the final normed states.
    """

    ids: mx.array
    log_probs: mx.array
    hidden: mx.array


def top_candidates(logits: mx.array, hidden: mx.array, count: int) -> Candidates:
    """Return the `count` best candidates of each stream from logits (γ, V).

    In two rounds: the best `count` all lie in the `count` groups of neighbouring ids with the
    highest maxima, so only the best groups are looked into. Partitioning and normalising whole
    rows of a large vocabulary is many times slower; probabilities are therefore relative to the
    best `NUM_GROUPS` groups, which hold nearly all of a row's mass. They only rank drafts.
    """
    R, V = logits.shape
    count = min(count, V)
    logits = logits.astype(mx.float32)
    if V > 2 * GROUP * NUM_GROUPS:
        if missing := -V % GROUP:
            logits = mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf)
        groups = logits.reshape(R, -1, GROUP)
        best = mx.argpartition(-groups.max(axis=-1), kth=NUM_GROUPS - 1, axis=-1)
        best = best[:, :NUM_GROUPS, None]
        logits = mx.take_along_axis(groups, best, axis=1).reshape(R, -1)
        # Only streams that overflowed to NaN rank behind the padding: any token will do then.
        ids = mx.minimum(best * GROUP + _WITHIN_GROUP, V - 1).reshape(R, -1)
    else:
        ids = mx.broadcast_to(mx.arange(V), (R, V))
    if count == 1:
        top = mx.argmax(logits, axis=-1, keepdims=True)
    else:
        top = mx.argpartition(-logits, kth=count - 1, axis=-1)[:, :count]
    values = mx.take_along_axis(logits, top, axis=-1)
    order = mx.argsort(-values, axis=-1)
    values = mx.take_along_axis(values, order, axis=-1)
    ids = mx.take_along_axis(ids, mx.take_along_axis(top, order, axis=-1), axis=-1)
    log_probs = values - mx.logsumexp(logits, axis=-1, keepdims=True)
    return Candidates(ids.astype(mx.int32), log_probs, hidden)


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
        h = self.mlp_out.shape[0]
        parts = [self.mlp_in[:, i * h : (i + 1) * h].T for i in range(1 + self.num_tokens)]
        return BySource(
            mx.concatenate([parts[0], self.lora_a], axis=1),
            mx.contiguous(parts[1]),
            mx.contiguous(parts[2]) if self.num_tokens > 1 else None,
            mx.concatenate([self.mlp_out, self.lora_b.T], axis=1),
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
    """W1 and A by what they read, and what candidates' head rows are multiplied with.

    from_parent: (h, m + r). from_stream, from_grandparent: (h, m). out: (h, m + r).
    """

    from_parent: mx.array
    from_stream: mx.array
    from_grandparent: mx.array | None
    out: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """Return all of them, for evaluation."""
        parts = (self.from_parent, self.from_stream, self.from_grandparent, self.out)
        return [array for array in parts if array is not None]


class ConditionedProposer:
    """Candidates of each level given their parents, as `tree.build` asks for them.

    What does not depend on the parent is computed once for all levels: the stream's half of W1,
    and E_c·W2 and E_c·B of every candidate, so that a level costs a few small products.
    """

    def __init__(self, conditioner: Conditioner, backbone: Backbone, marginal: Candidates) -> None:
        self.backbone = backbone
        self.marginal = marginal
        self.weights = conditioner.by_source
        self.of_stream = unit(marginal.hidden) @ self.weights.from_stream  # (γ, m)
        rows = backbone.head_rows(marginal.ids.reshape(-1))
        keys = (rows @ self.weights.out).reshape(*marginal.ids.shape, -1)  # (γ, C, m + r)
        m = self.weights.from_stream.shape[1]
        self.keys = keys[..., :m], keys[..., m:]
        # The candidates' mass is the same for every parent.
        self.mass = mx.logsumexp(marginal.log_probs, axis=-1)

    def _state(
        self, of_stream: mx.array, parents: mx.array, grandparents: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return what the candidates' `keys` are multiplied by, (W, m) and (W, r)."""
        weights = self.weights
        e = unit(self.backbone.embedding_rows(parents)) @ weights.from_parent
        m = weights.from_stream.shape[1]
        if weights.from_grandparent is not None:
            rows = unit(self.backbone.embedding_rows(grandparents))
            of_stream = mx.addmm(of_stream, rows, weights.from_grandparent)
        return _silu_of_sum(e[:, :m], of_stream), e[:, m:]

    def __call__(
        self, level: int, parents: mx.array, grandparents: mx.array, places: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return candidates (W, C) int32 and log-probabilities (W, C), in any order."""
        del places
        state, of_adapter = self._state(at(self.of_stream, level), parents, grandparents)
        keys, adapter_keys = (at(part, level).T for part in self.keys)
        gain = mx.addmm(of_adapter @ adapter_keys, state, keys).astype(mx.float32)
        scores = at(self.marginal.log_probs, level) + gain
        total = mx.logsumexp(scores, axis=-1, keepdims=True)
        log_probs = _normalised(scores, at(self.mass, level), total)
        return mx.broadcast_to(at(self.marginal.ids, level), scores.shape), log_probs

    def best(self, rows: mx.array, parents: mx.array, grandparents: mx.array) -> mx.array:
        """Return the best candidate (W,) int32 of each parent (W,); `rows` as in `ranked`."""
        ids, scores = self._scores(rows, parents, grandparents)
        best = mx.argmax(scores, axis=-1, keepdims=True)
        return mx.take_along_axis(ids, best, axis=-1)[:, 0]

    def ranked(
        self, rows: mx.array, parents: mx.array, grandparents: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return candidates (W, C) int32 and log-probabilities of each parent at a stream of its own.

        rows: (W,) int32, which row of the marginals each parent asks; chains of a batch have a
        row per sequence and stream.
        """
        ids, scores = self._scores(rows, parents, grandparents)
        total = mx.logsumexp(scores, axis=-1, keepdims=True)
        return ids, _normalised(scores, mx.take(self.mass, rows)[:, None], total)

    def _scores(
        self, rows: mx.array, parents: mx.array, grandparents: mx.array
    ) -> tuple[mx.array, mx.array]:
        states = self._state(mx.take(self.of_stream, rows, axis=0), parents, grandparents)
        parts = [
            mx.take(keys, rows, axis=0) @ state[:, :, None]
            for keys, state in zip(self.keys, states, strict=True)
        ]
        gain = (parts[0] + parts[1]).squeeze(-1).astype(mx.float32)
        scores = mx.take(self.marginal.log_probs, rows, axis=0) + gain
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
def _silu_of_sum(x: mx.array, y: mx.array) -> mx.array:
    return nn.silu(x + y)


@partial(mx.compile, shapeless=True)
def _normalised(scores: mx.array, mass: mx.array, total: mx.array) -> mx.array:
    return scores + (mass - total)


def at(array: mx.array, row: int) -> mx.array:
    """Return a row as a view; `array[row]` would start a kernel to copy it."""
    return array[row : row + 1].squeeze(0)


def unit(x: mx.array) -> mx.array:
    """Return x (..., h) divided by its root mean square."""
    return mx.fast.rms_norm(x, None, _EPSILON)
