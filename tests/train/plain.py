"""Small texts, stream weights and one pass of the trainer's forward over them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_specstream.config import StreamConfig
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.train.base import base_states, pad_texts
from mlx_specstream.train.batches import Selection
from mlx_specstream.train.data import Example
from mlx_specstream.train.head import Head
from mlx_specstream.train.loss import lossless_loss
from mlx_specstream.train.segments import cut
from mlx_specstream.train.targets import rows_of, stream_weights, target_counts


def some_texts(
    vocab: int = 12, lengths: tuple[int, ...] = (11, 8, 6), prompt: int = 3
) -> list[Example]:
    random = np.random.default_rng(1)
    return [
        Example(tuple(int(t) for t in random.integers(0, vocab, n)), prompt, f"text {i}")
        for i, n in enumerate(lengths)
    ]


def everything(examples: list[Example]) -> list[Selection]:
    return [Selection(example, tuple(example.positions)) for example in examples]


def whole_loss(
    model: nn.Module,
    config: StreamConfig,
    tensors: dict[str, mx.array],
    batch: list[Selection],
    *,
    size: int = 3,
    passes: int = 1,
    head: Head | None = None,
    decay: float = 0.8,
    **options: Any,
) -> tuple[float, dict[str, mx.array]]:
    """Return loss and gradients of a batch, its segments spread over `passes`."""
    backbone = Backbone(model)
    base = base_states(
        backbone, pad_texts([s.example.tokens for s in batch]), config.num_msa_layers
    )
    segments = cut([s.positions for s in batch], size)
    weights = stream_weights(target_counts(batch, config.num_streams), decay)
    total, sums = 0.0, {name: mx.zeros_like(t) for name, t in tensors.items()}
    step = -(-len(segments) // passes)
    for first in range(0, len(segments), step):
        part = segments[first : first + step]
        rows = rows_of(part, batch, config.num_streams)
        if not len(rows.index):
            continue

        def loss(tensors: dict[str, mx.array], part=part, rows=rows) -> mx.array:
            return lossless_loss(
                tensors,
                backbone,
                config,
                base,
                part,
                rows,
                weights,
                head or Head(backbone),
                **options,
            ).total

        value, gradients = mx.value_and_grad(loss)(tensors)
        mx.eval(value, gradients)
        total += value.item()
        sums = {name: sums[name] + gradients[name] for name in sums}
    return total, sums


def assert_close(found: dict[str, mx.array], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        a, b = np.array(value, dtype=np.float64), np.array(expected[name], dtype=np.float64)
        scale = max(1e-3, float(np.abs(b).max()))
        assert np.abs(a - b).max() <= tolerance * scale, name
