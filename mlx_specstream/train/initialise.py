"""Untrained stream weights: shapes from the config, sizes from the model they will join.

A stream embedding far below the hidden state's own scale is invisible and learns nothing for a
long time, so P_j starts at `EMBEDDING_SHARE` of the hidden states' root mean square, and its
learning rate follows that scale too. Everything low-rank starts at zero output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import numpy as np

from ..config import StreamConfig
from ..model.backbone import Backbone
from ..weights.fingerprint import base_dims
from ..weights.stream_tensors import stream_shapes
from .base import base_states
from .loss import Tensors
from .next_token import NUM_TEXTS, fit_next_token

EMBEDDING_SHARE = 0.125
"""σ of P_j against the rms of the hidden states it joins: 1.0 at rms 8 did best on a 135M model."""

EMBEDDING_RATE = 2.5
"""Learning rate of P_j over (adapters' rate x rms): 4e-2 against 2e-3 at rms 8."""

ZERO_AT_START = ("lora_b", "mlp_out")


def hidden_rms(backbone: Backbone, tokens: mx.array, num_msa_layers: int) -> float:
    """Return the root mean square of hidden states where streams start, first tokens left out.

    tokens: (1, L), a text without padding.
    """
    first = base_states(backbone, tokens, num_msa_layers).first[:, 1:].astype(mx.float32)
    return cast(float, mx.sqrt(mx.mean(mx.square(first))).item())


def untrained(
    backbone: Backbone, config: StreamConfig, rms: float, seed: int, gate: float = -6.0
) -> Tensors:
    """Return float32 stream weights that depend on the arguments alone.

    gate: score by which main's attention to its streams begins, in shared mode.
    """
    shared = config.mode == "shared"
    dims = base_dims(backbone.model)
    shapes = stream_shapes(config, dims, all_layers=shared, gates=shared)
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    return {
        name: mx.full(shape, gate) if name.endswith("stream_gate") else _draw(name, shape, key, rms)
        for (name, shape), key in zip(sorted(shapes.items()), keys, strict=True)
    }


def with_next_token(
    start: Tensors, backbone: Backbone, config: StreamConfig, texts: Sequence[Sequence[int]]
) -> Tensors:
    """Return `start` with the map of the next token fitted to texts, if it is still zero."""
    b = start.get("next_token.lora_b")
    if b is None or mx.any(b != 0).item():
        return start

    def pair(text: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        tokens = mx.array(list(text))
        first = base_states(backbone, tokens[None], config.num_msa_layers).first[0, 1:]
        rows = backbone.embedding_rows(tokens[2:])
        return np.array(first.astype(mx.float32)), np.array(rows.astype(mx.float32))

    found = fit_next_token(config.next_token_rank, map(pair, texts[:NUM_TEXTS]))
    return start | {"next_token.lora_a": mx.array(found.a), "next_token.lora_b": mx.array(found.b)}


def _draw(name: str, shape: tuple[int, ...], key: mx.array, rms: float) -> mx.array:
    if name == "stream_embeddings":
        return EMBEDDING_SHARE * rms * mx.random.normal(shape, key=key)
    if name == "conditioner.lora_a":  # as in the reference: here A is the zero one
        return mx.zeros(shape)
    if name == "conditioner.lora_b":
        return mx.random.uniform(-1, 1, shape, key=key) / math.sqrt(shape[0])
    if name.endswith(ZERO_AT_START):
        return mx.zeros(shape)
    inputs = shape[1] if name.endswith("mlp_in") else shape[0]
    return mx.random.uniform(-1, 1, shape, key=key) / math.sqrt(inputs)
