"""Shared mode [SS §3.1, Eq. 1 and 5]: one LoRA for main and streams, main attends its streams.

    loss = α_0 CE(main, x_{t+1})  +  Σ_j α_j CE(stream j, x_{t+1+j}),    completion positions only

Now main rows depend on the streams and gradients flow through every row. Segments stay exact: all
segments of a text run side by side, and main keys are gathered from all of them.

    rows of a segment:   main t..t+P-1 │ their P·γ streams
    its keys:            main 0..L-1 of the text (from all its segments) │ its own P·γ streams

A gate per head and layer, added to the scores main gives its streams, opens that attention gently
from a large negative value [own]. Prompt rows get no streams; the last prompt row does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..model.masks import causal_mask
from ..speculation.streams import Streams
from .base import KeptRows, embed_texts, kept_rows, pad_texts
from .batches import Selection
from .head import Head, cross_entropy
from .loss import PassLoss, Tensors, conditioner_of, recompute_layers, stream_loss
from .measure import Ranks, rank
from .objective import BatchResult, LosslessObjective
from .segments import Segments, segment_rows
from .targets import TargetRows, rows_of


class JointRows(KeptRows):
    """One layer's keys when main rows have gradients: all main rows of the text, own streams.

    Written: (B·n, K, P + P·γ, D), the n segments of a text side by side. Read: (B·n, K, L + P·γ, D).
    """

    def __init__(self, segments_per_text: int, num_main: int) -> None:
        super().__init__()
        self.segments_per_text, self.num_main = segments_per_text, num_main

    def read(self, end: int) -> tuple[mx.array, mx.array]:
        keys, values = super().read(end)
        return self._joined(keys), self._joined(values)

    def _joined(self, rows: mx.array) -> mx.array:
        n, P = self.segments_per_text, self.num_main
        _, K, _, D = rows.shape
        main = rows[:, :, :P].reshape(-1, n, K, P, D).transpose(0, 2, 1, 3, 4)
        main = mx.repeat(main.reshape(-1, K, n * P, D), n, axis=0)
        return mx.concatenate([main, rows[:, :, P:]], axis=2)


@dataclass(frozen=True)
class JointStates:
    """Final normed states: main (B, L, h), streams (B·n, P, γ, h)."""

    main: mx.array
    streams: mx.array


def joint_states(streams: Streams, batch: Sequence[Selection], size: int) -> JointStates:
    """Run main rows and streams of whole texts together, in segments of `size` positions."""
    backbone, G = streams.backbone, streams.num_streams
    tokens = pad_texts([s.example.tokens[:-1] for s in batch], pad_to=size)
    B, L = tokens.shape
    n, h = L // size, backbone.hidden_size
    cache = kept_rows(backbone.num_layers)
    for index in streams.upper:
        cache.layers[index] = JointRows(n, size)
    hidden = embed_texts(backbone, tokens)
    hidden = streams.run(hidden, L, streams.lower, cache, 0, 0, causal_mask(0, L))
    positions = mx.tile(mx.arange(L, dtype=mx.int32).reshape(n, size), (B, 1))
    first = mx.repeat(mx.array([s.example.prompt_length - 1 for s in batch]), n)
    pass_rows = segment_rows(positions, L, streams, first)
    main = hidden.reshape(B * n, size, h)
    starts = streams.start(main.reshape(1, B * L, h)).reshape(B * n, size * G, h)
    rows = mx.concatenate([main, starts], axis=1)
    rows = streams.run(rows, size, streams.upper, cache, 0, pass_rows.positions, pass_rows.mask)
    normed = backbone.norm(rows)
    return JointStates(
        normed[:, :size].reshape(B, L, h), normed[:, size:].reshape(B * n, size, G, h)
    )


def whole_segments(batch: Sequence[Selection], size: int) -> Segments:
    """Return the segments `joint_states` computes; valid are the selected positions."""
    longest = max(len(s.example.tokens) - 1 for s in batch)
    n = -(-longest // size)
    positions = np.tile(np.arange(n * size, dtype=np.int32).reshape(n, size), (len(batch), 1))
    text = np.repeat(np.arange(len(batch), dtype=np.int32), n)
    valid = np.zeros(positions.shape, dtype=bool)
    for number, selection in enumerate(batch):
        chosen = np.zeros(n * size, dtype=bool)
        chosen[list(selection.positions)] = True
        valid[text == number] = chosen.reshape(n, size)
    return Segments(text, positions, valid)


def main_rows(batch: Sequence[Selection]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return text, position and next token of all completion positions, each (R,)."""
    text, at, target = [], [], []
    for number, selection in enumerate(batch):
        tokens = selection.example.tokens
        for t in range(selection.example.prompt_length - 1, len(tokens) - 1):
            text.append(number)
            at.append(t)
            target.append(tokens[t + 1])
    return tuple(np.array(part, dtype=np.int32) for part in (text, at, target))  # type: ignore[return-value]


class SharedObjective(LosslessObjective):
    """Main and streams through one LoRA; passes are groups of whole texts."""

    def gradients(
        self, tensors: Tensors, batch: Sequence[Selection], weights: np.ndarray, head: Head
    ) -> BatchResult:
        """Return the loss's gradient; weights: (γ + 1,), of a row of each stream, then of main."""
        result = self.empty(tensors)
        for part in self._groups(batch):
            rows = rows_of(whole_segments(part, self.options.segment_size), part, self.num_streams)

            def loss(tensors: Tensors, part=part, rows=rows):  # type: ignore[no-untyped-def]
                found, main = self.pass_loss(tensors, part, rows, weights, head)
                return found.total, [*found.arrays[1:], main]

            (total, losses), gradients = mx.value_and_grad(loss)(tensors)
            result.add_pass(gradients, total, losses[:-1], rows)
            result.extra["main"] = result.extra.get("main", 0.0) + float(
                np.array(losses[-1]).sum() * weights[-1] / max(self.options.main_loss, 1e-9)
            )
        return result

    @property
    def num_streams(self) -> int:
        return self.config.num_streams

    def pass_loss(
        self,
        tensors: Tensors,
        batch: Sequence[Selection],
        rows: TargetRows,
        weights: np.ndarray,
        head: Head,
    ) -> tuple[PassLoss, mx.array]:
        """Return the loss of some texts, and the main rows' cross-entropies."""
        streams = Streams(self.backbone, self.config, tensors)
        if self.options.grad_checkpoint:
            recompute_layers(streams)
        states = joint_states(streams, batch, self.options.segment_size)
        text, at, target = main_rows(batch)
        main = states.main[mx.array(text), mx.array(at)]
        row_weights = np.full(len(target), weights[-1], dtype=np.float32)
        total, hard = cross_entropy(main, head, target, row_weights)
        hidden = states.streams.reshape(-1, main.shape[-1])[mx.array(rows.index)]
        found = stream_loss(hidden, tensors, self.backbone, rows, weights[:-1], head)
        return PassLoss(total + found.total, found.marginal, found.conditioned), hard

    def weights(self, batches: Sequence[Sequence[Selection]]) -> np.ndarray:
        """Return what a row of each stream, and of main, counts in an update."""
        counts = np.maximum(self.counts(batches), 1)
        alpha = self.options.stream_loss * self.options.alpha_decay ** np.arange(len(counts))
        rows = sum(len(main_rows(batch)[0]) for batch in batches)
        weights = [*(alpha / counts), self.options.main_loss / max(rows, 1)]
        return np.array(weights, dtype=np.float32)

    def measure(self, tensors: Tensors, batch: Sequence[Selection]) -> list[Ranks]:
        """Rank the streams' targets; main's own cross-entropy goes with the record as well."""
        streams = Streams(self.backbone, self.config, tensors)
        conditioner = None
        if self.config.conditioner_rank:
            conditioner = conditioner_of(tensors, self.backbone.dtype)
        ranks = []
        for part in self._groups(batch):
            states = joint_states(streams, part, self.options.segment_size)
            segments = whole_segments(part, self.options.segment_size)
            rows = rows_of(segments, part, self.num_streams)
            hidden = states.streams.reshape(-1, states.main.shape[-1])[mx.array(rows.index)]
            sizes = (segments.positions.size, self.num_streams)
            ranks.append(rank(hidden, rows, *sizes, self.backbone, conditioner))
        return ranks

    def main_loss(self, tensors: Tensors, texts: Sequence[Selection]) -> float:
        """Return the main stream's cross-entropy per completion token, whole vocabulary."""
        streams, total, count = Streams(self.backbone, self.config, tensors), 0.0, 0
        for part in self._groups(texts):
            states = joint_states(streams, part, self.options.segment_size)
            text, at, target = main_rows(part)
            main = states.main[mx.array(text), mx.array(at)]
            ones = np.ones(len(target), dtype=np.float32)
            _, hard = cross_entropy(main, Head(self.backbone), target, ones)
            total, count = total + float(np.array(hard).sum()), count + len(target)
        return total / max(count, 1)

    def _groups(self, batch: Sequence[Selection]) -> list[Sequence[Selection]]:
        """Return the batch in groups of texts whose rows fit a pass."""
        longest = max(len(s.example.tokens) for s in batch)
        size = max(1, self.options.rows_per_pass // (longest * (1 + self.num_streams)))
        return [batch[start : start + size] for start in range(0, len(batch), size)]
