"""Drafts of a batch that are often right, for models whose random streams hardly ever are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import mlx.core as mx

from mlx_specstream.batch import BatchDecoder
from mlx_specstream.batch.chains import ChainCandidates
from mlx_specstream.batch.step import BatchStepper


@dataclass(frozen=True)
class TableCandidates(ChainCandidates):
    """After any token, what the model says after that token alone: (V, k), best first."""

    ids: mx.array
    log_probs: mx.array

    def best(
        self, level: int, sequences: mx.array, parents: mx.array, before: mx.array
    ) -> mx.array:
        return self.ranked(level, sequences, parents, before)[0][:, 0]

    def ranked(
        self, level: int, sequences: mx.array, parents: mx.array, before: mx.array
    ) -> tuple[mx.array, mx.array]:
        return mx.take(self.ids, parents, axis=0), mx.take(self.log_probs, parents, axis=0)


class TableBatchStepper(BatchStepper):
    """Drafts from a table in place of its streams."""

    ids: mx.array
    log_probs: mx.array

    def candidates(self, states: mx.array) -> ChainCandidates:
        of_streams = super().candidates(states)
        own = {f.name: getattr(of_streams, f.name) for f in dataclasses.fields(of_streams)}
        ids = self.ids + 0 * mx.isnan(mx.sum(states))  # the streams' pass is computed all the same
        return TableCandidates(**own, ids=ids, log_probs=self.log_probs)


def with_batch_table(decoder: BatchDecoder) -> BatchDecoder:
    """Let a decoder's drafts come from the model's own one-token contexts."""
    old = decoder.stepper
    stepper = TableBatchStepper(**{f.name: getattr(old, f.name) for f in dataclasses.fields(old)})
    logits = old.backbone.model(mx.arange(old.backbone.vocab_size)[:, None])[:, -1]
    log_probs = logits.astype(mx.float32)
    log_probs = log_probs - mx.logsumexp(log_probs, axis=-1, keepdims=True)
    ids = mx.argsort(-log_probs, axis=-1)[:, :8].astype(mx.int32)
    object.__setattr__(stepper, "ids", ids)
    object.__setattr__(stepper, "log_probs", mx.take_along_axis(log_probs, ids, axis=-1))
    mx.eval(stepper.ids, stepper.log_probs)
    decoder.stepper = stepper
    return decoder
