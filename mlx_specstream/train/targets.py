"""What every stream row is to predict, and how much it counts.

Stream j of position t predicts x_{t+1+j}. Its parent in a chain is x_{t+j}; the main row that
predicts the same token stands at t+j.

    loss = Σ_j α_j · mean over stream j's rows,    α_j ∝ decay^(j-1),  Σ α_j = 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .batches import Selection
from .segments import Segments


@dataclass(frozen=True)
class Rows:
    """The stream rows of a pass that have a target, on the host; each array (R,).

    index: place among the pass's n·P·γ rows. stream: 0..γ-1. text: which text of the batch.
    target, parent, grandparent: tokens, each of the one before. teacher: position of the main row
    that predicts the same token.
    """

    index: np.ndarray
    stream: np.ndarray
    text: np.ndarray
    target: np.ndarray
    parent: np.ndarray
    grandparent: np.ndarray
    teacher: np.ndarray


def rows_of(segments: Segments, batch: Sequence[Selection], num_streams: int) -> Rows:
    """Collect the rows of `segments`, which were cut from `batch`, that have a target."""
    lengths = np.array([len(selection.example.tokens) for selection in batch])
    tokens = np.zeros((len(batch), lengths.max() + num_streams), dtype=np.int32)
    for row, selection in zip(tokens, batch, strict=True):
        row[: len(selection.example.tokens)] = selection.example.tokens
    streams = np.arange(1, num_streams + 1)
    parents_at = segments.positions[..., None] + streams  # (n, P, γ)
    text = np.broadcast_to(segments.text[:, None, None], parents_at.shape)
    has_target = segments.valid[..., None] & (parents_at + 1 < lengths[text])
    index = np.flatnonzero(has_target)
    text, at = text.reshape(-1)[index], parents_at.reshape(-1)[index]
    return Rows(
        index.astype(np.int32),
        (index % num_streams).astype(np.int32),
        text.astype(np.int32),
        tokens[text, at + 1],
        tokens[text, at],
        tokens[text, at - 1],
        at.astype(np.int32),
    )


def target_counts(batch: Sequence[Selection], num_streams: int) -> np.ndarray:
    """Return how many targets each stream has in a batch, (γ,); adds up over batches."""
    counts = np.zeros(num_streams, dtype=np.int64)
    for selection in batch:
        at = np.array(selection.positions)
        for j in range(1, num_streams + 1):
            counts[j - 1] += int((at + 1 + j < len(selection.example.tokens)).sum())
    return counts


def stream_weights(counts: np.ndarray, decay: float) -> np.ndarray:
    """Return the weight of one row of each stream, (γ,): α_j over the stream's row count."""
    alpha = decay ** np.arange(len(counts), dtype=np.float64)
    alpha /= alpha.sum()
    return (alpha / np.maximum(counts, 1)).astype(np.float32)
