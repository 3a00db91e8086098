"""One batch of lossless training: the base once, then pass after pass over its segments.

    batch ──► base states ──► segments ──► pass 1 ─┐
                                           pass 2 ─┼─► gradients add up, exactly
                                           ...    ─┘

How many stream rows are in memory at a time is the pass's size; the result does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_specstream.backbone import Backbone
from mlx_specstream.config import StreamConfig
from mlx_specstream.streams import Streams

from .base import BaseStates, base_states, pad_texts
from .batches import Selection
from .head import VocabularySampler
from .loss import Tensors, conditioner_of, lossless_loss
from .measure import Ranks, rank
from .options import TrainOptions
from .segments import Segments, cut, stream_states
from .targets import rows_of, stream_weights, target_counts


@dataclass
class BatchResult:
    """Gradients of a batch and, per stream, summed cross-entropies; zero for an empty batch."""

    gradients: Tensors
    total: float
    marginal: np.ndarray
    conditioned: np.ndarray | None
    extra: dict[str, float] = field(default_factory=dict)

    def add(self, other: BatchResult) -> None:
        """Add another batch of the same update."""
        self.gradients = {name: g + other.gradients[name] for name, g in self.gradients.items()}
        mx.eval(self.gradients)
        self.total += other.total
        self.marginal = self.marginal + other.marginal
        if self.conditioned is not None and other.conditioned is not None:
            self.conditioned = self.conditioned + other.conditioned
        self.extra |= other.extra


@dataclass(frozen=True)
class LosslessObjective:
    """The frozen base, and stream rows to differentiate [SS §3, lossless mode]."""

    backbone: Backbone
    config: StreamConfig
    options: TrainOptions
    sampler: VocabularySampler

    def gradients(
        self, tensors: Tensors, batch: Sequence[Selection], weights: np.ndarray, seed: int
    ) -> BatchResult:
        """Return the loss's gradient, summed over the batch's passes.

        weights: (γ,), what a row of each stream counts. seed: of the sampled vocabulary.
        """
        G, options = self.config.num_streams, self.options
        result = self.empty(tensors)
        base, segments = self._prepare(batch, with_last=options.soft_targets > 0)
        for number, part in enumerate(self._passes(segments)):
            rows = rows_of(part, batch, G)
            if not len(rows.index):
                continue
            head = self.sampler.draw(rows.target, (options.seed, seed, number))

            def loss(tensors: Tensors, part=part, rows=rows, head=head):  # type: ignore[no-untyped-def]
                found = lossless_loss(
                    tensors,
                    self.backbone,
                    self.config,
                    base,
                    part,
                    rows,
                    weights,
                    head,
                    options.soft_targets,
                    options.grad_checkpoint,
                )
                return found.total, found.arrays[1:]

            (total, losses), gradients = mx.value_and_grad(loss)(tensors)
            result.gradients = {
                name: result.gradients[name] + gradients[name] for name in result.gradients
            }
            mx.eval(result.gradients, total, losses)
            result.total += total.item()
            sums = [np.bincount(rows.stream, np.array(part), minlength=G) for part in losses]
            result.marginal += sums[0]
            if result.conditioned is not None:
                result.conditioned += sums[1]
        return result

    def counts(self, batches: Sequence[Sequence[Selection]]) -> np.ndarray:
        """Return how many targets each stream has in an update's batches, (γ,)."""
        G = self.config.num_streams
        return np.sum([target_counts(batch, G) for batch in batches], axis=0)

    def weights(self, batches: Sequence[Sequence[Selection]]) -> np.ndarray:
        """Return what a row of each stream counts in an update of these batches, (γ,)."""
        return stream_weights(self.counts(batches), self.options.alpha_decay)

    def empty(self, tensors: Tensors) -> BatchResult:
        """Return the result of no texts at all."""
        G = self.config.num_streams
        return BatchResult(
            {name: mx.zeros(t.shape) for name, t in tensors.items()},
            0.0,
            np.zeros(G),
            np.zeros(G) if self.config.conditioner_rank else None,
        )

    def measure(self, tensors: Tensors, batch: Sequence[Selection]) -> list[Ranks]:
        """Rank every target of a batch among the streams' candidates."""
        streams = Streams(self.backbone, self.config, tensors)
        conditioner = (
            conditioner_of(tensors, self.backbone.dtype) if self.config.conditioner_rank else None
        )
        base, segments = self._prepare(batch, with_last=False)
        ranks = []
        for part in self._passes(segments):
            rows = rows_of(part, batch, self.config.num_streams)
            if not len(rows.index):
                continue
            hidden = stream_states(streams, base, part)
            hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(rows.index)]
            sizes = (part.positions.size, self.config.num_streams)
            ranks.append(rank(hidden, rows, *sizes, self.backbone, conditioner))
        return ranks

    def _prepare(self, batch: Sequence[Selection], with_last: bool) -> tuple[BaseStates, Segments]:
        tokens = pad_texts([s.example.tokens[:-1] for s in batch])
        base = base_states(self.backbone, tokens, self.config.num_msa_layers)
        mx.eval(base.first, base.keys, base.values, *([base.last] if with_last else []))
        return base, cut([s.positions for s in batch], self.options.segment_size)

    def _passes(self, segments: Segments) -> list[Segments]:
        rows = self.options.segment_size * self.config.num_streams
        size = max(1, self.options.rows_per_pass // rows)
        return [segments[start : start + size] for start in range(0, len(segments), size)]
