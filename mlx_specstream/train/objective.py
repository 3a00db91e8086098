"""One batch of lossless training: the base once, then pass after pass over its segments.

    batch ──► base states ──► segments ──► pass 1 ─┐
                                           pass 2 ─┼─► gradients add up, exactly
                                           ...    ─┘

How many stream rows are in memory at a time is the pass's size; the result does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx
import numpy as np

from ..config import StreamConfig
from ..model.backbone import Backbone
from ..speculation.streams import Streams
from .base import BaseStates, base_states, pad_texts
from .batches import Selection
from .early_exit import exit_rows, exit_states
from .figures import Ranks, summarize
from .head import Head, cross_entropy
from .loss import Tensors, conditioner_of, lossless_loss
from .measure import rank
from .options import TrainOptions
from .segments import Segments, cut, stream_states
from .targets import TargetRows, rows_of, stream_weights, target_counts
from .vocabulary import VocabularySampler


def number(scalar: mx.array) -> float:
    """Return a () array on the host."""
    return cast(float, scalar.item())


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

    def add_pass(
        self, gradients: Tensors, total: mx.array, losses: Sequence[mx.array], rows: TargetRows
    ) -> None:
        """Add one pass: its gradients, its loss, and each row's cross-entropies (R,)."""
        self.gradients = {name: g + gradients[name] for name, g in self.gradients.items()}
        mx.eval(self.gradients, total, losses)
        self.total += number(total)
        G = len(self.marginal)
        sums = [np.bincount(rows.stream, np.array(part), minlength=G) for part in losses]
        self.marginal = self.marginal + sums[0]
        if self.conditioned is not None:
            self.conditioned = self.conditioned + sums[1]


@dataclass(frozen=True)
class LosslessObjective:
    """The frozen base, and stream rows to differentiate [SS §3, lossless mode]."""

    backbone: Backbone
    config: StreamConfig
    options: TrainOptions
    sampler: VocabularySampler

    def head(self, batch: Sequence[Selection], number: int) -> Head:
        """Return the head for batch `number`; all processes and passes of it have the same."""
        tokens = np.concatenate([s.example.tokens[s.example.prompt_length :] for s in batch])
        return Head.of(self.backbone, self.sampler.draw(tokens, (self.options.seed, number)))

    def gradients(
        self, tensors: Tensors, batch: Sequence[Selection], weights: np.ndarray, head: Head
    ) -> BatchResult:
        """Return the loss's gradient, summed over the batch's passes.

        weights: (γ,), what a row of each stream counts.
        """
        G, options = self.config.num_streams, self.options
        result = self.empty(tensors)
        base, segments = self._prepare(batch, with_last=options.soft_targets > 0)
        for part in self._passes(segments):
            rows = rows_of(part, batch, G)
            if not len(rows):
                continue

            def loss(tensors: Tensors, part=part, rows=rows):  # type: ignore[no-untyped-def]
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
            result.add_pass(gradients, total, losses, rows)
        if self.config.pruner_rank:
            self._add_pruner(result, tensors, batch, base, float(weights[0]), head)
        return result

    def _add_pruner(
        self,
        result: BatchResult,
        tensors: Tensors,
        batch: Sequence[Selection],
        base: BaseStates,
        weight: float,
        head: Head,
    ) -> None:
        """Add the early exit's next-token loss; it touches the pruner's weights alone."""
        own = {name: t for name, t in tensors.items() if name.startswith("pruner.")}
        text, at, target = exit_rows(batch)

        def loss(own: Tensors) -> tuple[mx.array, mx.array]:
            states = exit_states(own, self.backbone, base, text, at)
            return cross_entropy(states, head, target, np.full(len(target), weight, np.float32))

        (total, losses), gradients = mx.value_and_grad(loss)(own)
        for name, gradient in gradients.items():
            result.gradients[name] = result.gradients[name] + gradient
        mx.eval(result.gradients, total, losses)
        result.total += number(total)
        result.extra["early_exit"] = round(number(mx.mean(losses)), 4)

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
            if not len(rows):
                continue
            hidden = stream_states(streams, base, part)
            hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(rows.index)]
            sizes = (part.positions.size, self.config.num_streams)
            ranks.append(rank(hidden, rows, *sizes, self.backbone, conditioner))
        return ranks

    def figures(self, ranks: Sequence[Ranks]) -> dict[str, object]:
        """Return what a validation tells of the ranks that `measure` gave."""
        return summarize(ranks)

    def _prepare(self, batch: Sequence[Selection], with_last: bool) -> tuple[BaseStates, Segments]:
        tokens = pad_texts([s.example.tokens[:-1] for s in batch])
        base = base_states(self.backbone, tokens, self.config.num_msa_layers)
        mx.eval(base.first, base.keys, base.values, *([base.last] if with_last else []))
        return base, cut([s.positions for s in batch], self.options.segment_size)

    def _passes(self, segments: Segments) -> list[Segments]:
        rows = self.options.segment_size * self.config.num_streams
        size = max(1, self.options.rows_per_pass // rows)
        return [segments[start : start + size] for start in range(0, len(segments), size)]
