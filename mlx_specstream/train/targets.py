"""What every stream row is to predict, and how much it counts.

Stream j of position t predicts x_{t+1+j}. Its parent in a chain is x_{t+j}; the main row that
predicts the same token stands at t+j.

    loss = Σ_j α_j · mean over stream j's rows,    α_j ∝ decay^(j-1),  Σ α_j = 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .batches import Selection

if TYPE_CHECKING:
    from .segments import Segments


@dataclass(frozen=True)
class TargetRows:
    """The stream rows of a pass that have a target, on the host; each array (R,).

    index: place among the pass's N·γ rows (position, stream). stream: 0..γ-1. text: which text of
    the batch. target, parent, grandparent: tokens, each of the one before. teacher: position of the
    main row that predicts the same token.
    """

    index: np.ndarray
    stream: np.ndarray
    text: np.ndarray
    target: np.ndarray
    parent: np.ndarray
    grandparent: np.ndarray
    teacher: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def within(self, start: int, stop: int) -> TargetRows:
        """Return the rows whose place is in start..stop, counted from there."""
        chosen = (self.index >= start) & (self.index < stop)
        parts = {name: array[chosen] for name, array in vars(self).items()}
        return TargetRows(**{**parts, "index": parts["index"] - start})


def target_rows(
    texts: Sequence[Sequence[int]],
    text: np.ndarray,
    positions: np.ndarray,
    num_streams: int,
    valid: np.ndarray | None = None,
) -> TargetRows:
    """Collect the rows with a target of N positions, each with its γ streams.

    text, positions: (N,), which of the texts and where in it. valid: (N,) bool, false for positions
    that only fill up.
    """
    lengths = np.array([len(tokens) for tokens in texts])
    table = np.zeros((len(texts), lengths.max() + num_streams), dtype=np.int32)
    for row, tokens in zip(table, texts, strict=True):
        row[: len(tokens)] = tokens
    parents_at = positions[:, None] + np.arange(1, num_streams + 1)  # (N, γ)
    text = np.broadcast_to(text[:, None], parents_at.shape)
    has_target = parents_at + 1 < lengths[text]
    if valid is not None:
        has_target &= valid[:, None]
    index = np.flatnonzero(has_target)
    text, at = text.reshape(-1)[index], parents_at.reshape(-1)[index]
    return TargetRows(
        index.astype(np.int32),
        (index % num_streams).astype(np.int32),
        text.astype(np.int32),
        table[text, at + 1],
        table[text, at],
        table[text, at - 1],
        at.astype(np.int32),
    )


def rows_of_batch(batch: Sequence[Selection], num_streams: int) -> TargetRows:
    """Collect the rows of all selected positions, one text after another."""
    text = np.repeat(np.arange(len(batch)), [len(s.positions) for s in batch])
    positions = np.array([t for s in batch for t in s.positions])
    return target_rows([s.example.tokens for s in batch], text, positions, num_streams)


def rows_of(segments: Segments, batch: Sequence[Selection], num_streams: int) -> TargetRows:
    """Collect the rows of `segments`, which were cut from `batch`."""
    return target_rows(
        [selection.example.tokens for selection in batch],
        np.repeat(segments.text, segments.positions.shape[1]),
        segments.positions.reshape(-1),
        num_streams,
        segments.valid.reshape(-1),
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
