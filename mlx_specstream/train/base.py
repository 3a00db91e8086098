"""The frozen model's part of a lossless step: run once per batch, without gradient.

Main rows never depend on the streams, so all that stream rows need of the main stream is known
beforehand: the hidden states where streams start, and the main keys and values of the MSA layers.
The model may be quantised; none of its weights is ever touched.

    tokens (B, L) ──► lower layers ──► first (B, L, h) ──► MSA layers ──► last (B, L, h)
                                                             │ keys, values (B, K, L, D) per layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone
from ..model.cache import KVCache, LayerKV
from ..model.masks import causal_mask

PAD_TO = 8
"""Texts of a batch are padded to a multiple of this, so that few shapes occur."""


@dataclass(frozen=True)
class BaseStates:
    """What the base model computed for a batch of texts, padded on the right.

    first: (B, L, h), at the input of the first MSA layer. last: (B, L, h), after the final norm.
    keys, values: for each MSA layer (B, K, L, D). first_msa: index of the first MSA layer.
    tokens: (B, L) int32, the texts.
    """

    first: mx.array
    last: mx.array
    keys: tuple[mx.array, ...]
    values: tuple[mx.array, ...]
    first_msa: int
    tokens: mx.array


class KeptRows(LayerKV):
    """Keeps the rows of one pass over whole texts, (B, K, L, D), as they were written."""

    def write(self, at: int, keys: mx.array, values: mx.array) -> None:
        assert at == 0
        self.keys, self.values = keys, values

    def read(self, end: int) -> tuple[mx.array, mx.array]:
        assert self.keys is not None
        assert self.values is not None
        assert end == self.keys.shape[2]
        return self.keys, self.values


def kept_rows(num_layers: int) -> KVCache:
    """Return a cache that keeps the rows of one pass over whole texts."""
    cache = KVCache(0)
    cache.layers = [KeptRows() for _ in range(num_layers)]
    return cache


def pad_texts(texts: Sequence[Sequence[int]], pad_to: int = PAD_TO) -> mx.array:
    """Return texts side by side, (B, L) int32, zeros behind the shorter ones."""
    longest = max(len(text) for text in texts)
    padded = np.zeros((len(texts), -(-longest // pad_to) * pad_to), dtype=np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return mx.array(padded)


def embed_texts(backbone: Backbone, tokens: mx.array) -> mx.array:
    """Return the input hidden states (B, L, h) of texts (B, L)."""
    return backbone.embed(tokens.reshape(-1)).reshape(*tokens.shape, -1)


def base_states(backbone: Backbone, tokens: mx.array, num_msa_layers: int) -> BaseStates:
    """Run the base model over texts (B, L); what stands behind a text's end changes nothing of it.

    The graph is lazy: `last` costs nothing unless it is used.
    """
    N = backbone.num_layers
    first_msa = N - num_msa_layers
    cache = kept_rows(N)
    mask = causal_mask(0, tokens.shape[1])
    hidden = embed_texts(backbone, tokens)
    first = backbone.run(hidden, range(first_msa), cache, 0, 0, mask)
    last = backbone.norm(backbone.run(first, range(first_msa, N), cache, 0, 0, mask))
    rows = [layer.read(tokens.shape[1]) for layer in cache.layers[first_msa:]]
    keys, values = zip(*rows, strict=True)
    return BaseStates(
        mx.stop_gradient(first),
        mx.stop_gradient(last),
        tuple(mx.stop_gradient(k) for k in keys),
        tuple(mx.stop_gradient(v) for v in values),
        first_msa,
        tokens,
    )
