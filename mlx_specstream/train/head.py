"""Cross-entropy under the frozen LM head: in chunks, with the gradient made on the way forward.

The head is the largest product of a step: every stream row against every token. Two things keep
it in bounds. Logits exist for `CHUNK` rows at a time; what is kept is the gradient of the loss
with respect to the hidden states, (R, h). And the vocabulary may be sampled (`vocabulary.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone
from .vocabulary import Vocabulary

CHUNK = 512
"""Rows whose logits exist at the same time."""


@dataclass(frozen=True)
class Head:
    """The LM head, whole or for some tokens only.

    rows: (V', h), the head's rows for the sampled `tokens` (V',), None for the whole vocabulary.
    bias: (V',) float32, added to the sampled logits. place: (V,), where a token is among them.
    """

    backbone: Backbone
    rows: mx.array | None = None
    tokens: mx.array | None = None
    bias: mx.array | None = None
    place: np.ndarray | None = None

    @classmethod
    def of(cls, backbone: Backbone, vocabulary: Vocabulary | None) -> Head:
        """Return the head of some tokens; None: of all."""
        if vocabulary is None:
            return cls(backbone)
        tokens, bias = mx.array(vocabulary.tokens.astype(np.int32)), mx.array(vocabulary.bias)
        return cls(backbone, backbone.head_rows(tokens), tokens, bias, vocabulary.place)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits (R, V') of normed hidden states (R, h), in the model's dtype."""
        if self.rows is None or self.tokens is None:
            return self.backbone.head(hidden[None]).squeeze(0)
        return self.backbone.from_rows(hidden @ self.rows.T, self.tokens)

    def scores(self, logits: mx.array) -> mx.array:
        """Return logits in float32, with the correction for what was sampled."""
        logits = logits.astype(mx.float32)
        return logits if self.bias is None else logits + self.bias

    def places(self, tokens: np.ndarray) -> mx.array:
        """Return where tokens (R,) stand in the logits."""
        return mx.array(tokens if self.place is None else self.place[tokens])


def cross_entropy(
    hidden: mx.array,
    head: Head,
    targets: np.ndarray,
    weights: np.ndarray,
    teacher: mx.array | None = None,
    soft: float = 0.0,
) -> tuple[mx.array, mx.array]:
    """Return the weighted loss () and each row's cross-entropy to its token (R,), both float32.

    Only the first has a gradient, and only with respect to `hidden`.

    Args:
        hidden: (R, h), normed states. targets: (R,) tokens. weights: (R,).
        teacher: (R, h), normed states of the frozen model for the same tokens.
        soft: share of the loss that is cross-entropy to the teacher's distribution.
    """
    places, row_weights = head.places(targets), mx.array(weights)

    def chunk(hidden: mx.array, at: slice) -> tuple[mx.array, mx.array, mx.array]:
        logits = head.logits(hidden)
        scores = head.scores(logits)
        log_probs = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
        target = places[at][:, None]
        hard = -mx.take_along_axis(log_probs, target, axis=-1)[:, 0]
        rows = mx.arange(hidden.shape[0])
        slope = mx.exp(log_probs).at[rows, target[:, 0]].add(soft - 1.0)
        loss = hard
        if teacher is not None and soft > 0:
            wanted = mx.softmax(head.scores(head.logits(teacher[at])), axis=-1)
            loss = (1 - soft) * hard - soft * (wanted * log_probs).sum(axis=-1)
            slope = slope - soft * wanted
        slope = (slope * row_weights[at][:, None]).astype(logits.dtype)
        _, (gradient,) = mx.vjp(lambda x: (head.logits(x),), [hidden], [slope])
        return loss, hard, gradient

    @mx.custom_function
    def run(hidden: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        parts = []
        for start in range(0, hidden.shape[0], CHUNK):
            at = slice(start, min(start + CHUNK, hidden.shape[0]))
            parts.append(chunk(hidden[at], at))
        loss, hard, gradient = (mx.concatenate(list(part)) for part in zip(*parts, strict=True))
        return (loss * row_weights).sum(), hard, gradient

    @run.vjp
    def run_vjp(
        primals: object, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> mx.array:
        del primals
        gradient = outputs[2]
        return (gradient.astype(mx.float32) * cotangents[0]).astype(gradient.dtype)

    total, hard, _ = cast(tuple[mx.array, mx.array, mx.array], run(hidden))
    return total, hard
