"""What is minimised: lossless streams, shared streams, or the pruner.

| objective | trained | main rows | loss |
|---|---|---|---|
| `LosslessObjective` | P_j, LoRA on stream rows, conditioner | frozen, from `states.py` | Σ α_j CE_j, and conditioned |
| `SharedObjective` | P_j, LoRA on every row | computed, they see their streams | α_0 CE + Σ α_j CE_j [SS Eq. 5] |
| `PrunerObjective` | the early-exit map alone | frozen, from `states.py` | CE of the next token [SS §3.1.3] |

Each one turns a batch of selected positions into a scalar to differentiate, figures for the log, and held-out figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...train.batches import Selection
from ...train.data import Example
from ...train.figures import summarize
from . import workers
from .adapters import StreamAdapters
from .backbone import Backbone
from .data import Targets, targets
from .joint import JointStreams
from .loss import (
    HeadCrossEntropy,
    Vocabulary,
    VocabularySampler,
    stream_weights,
)
from .measure import rank_targets
from .packed import PackedBatch, PackedStreams
from .states import States

Figures = dict[str, object]
EVAL_TEXTS = 8
"""Held-out texts measured together."""


class Objective(Protocol):
    """A loss over batches of selected positions. done: how much of the run is behind, 0..1; the trainer sets it."""

    done: float

    def loss(self, batch: Sequence[Selection], seed: int) -> tuple[Tensor, Figures]:
        """Return this process's share of the loss, and figures of it; `seed` draws the vocabulary subset."""

    def evaluate(self, held_out: Sequence[Selection]) -> Figures:
        """Return held-out figures, the whole vocabulary counted; to be called on every process."""


@dataclass(frozen=True)
class StreamLoss:
    """A scalar to differentiate, and its parts for the log."""

    total: Tensor
    figures: Figures


@dataclass
class Common:
    """What every objective needs."""

    backbone: Backbone
    adapters: StreamAdapters
    sampler: VocabularySampler
    base_states: Callable[[Example], States]
    alpha_decay: float = 0.8

    def pack(self, batch: Sequence[Selection]) -> PackedBatch:
        """Gather the base states of a batch."""
        return PackedBatch(
            [self.base_states(s.example) for s in batch],
            [torch.tensor(s.rows) for s in batch],
            [len(s.example.prompt) - 1 for s in batch],
            torch.tensor([s.example.answer[i] for s in batch for i in s.rows]),
        )

    def head(self, tokens: Tensor, seed: int) -> tuple[Tensor, Vocabulary]:
        """Return the head's rows (V', h) of a subset that holds `tokens`, and the subset."""
        vocabulary = self.sampler.draw(tokens, seed)
        return self.backbone.head_weight[vocabulary.ids], vocabulary

    def stream_loss(
        self,
        streams: Tensor,
        wanted: Targets,
        weights: Tensor,
        head: Tensor,
        vocabulary: Vocabulary,
    ) -> StreamLoss:
        """Return the streams' loss, marginal and, with a conditioner, given the parents; sums of weighted rows.

        streams: (N, γ, h) normed. weights: (R,), of the R valid rows of `wanted`.
        """
        hidden, G = streams[wanted.valid], streams.shape[1]
        places, stream = vocabulary.index[wanted.tokens[wanted.valid]], wanted.valid.nonzero()[:, 1]
        total, losses = HeadCrossEntropy.apply(hidden, head, vocabulary.log_weight, places, weights)
        figures: Figures = {"loss": mean_per_stream(losses, stream, G)}
        if self.adapters.conditioner is not None:
            parents, before = (
                self.backbone.embed(ids[wanted.valid])
                for ids in (wanted.parents, wanted.grandparents)
            )
            corrected = self.adapters.conditioner(parents, hidden, before)
            extra, losses = HeadCrossEntropy.apply(
                corrected, head, vocabulary.log_weight, places, weights
            )
            total = total + extra
            figures["conditioned_loss"] = mean_per_stream(losses, stream, G)
        return StreamLoss(total, figures)


class LosslessObjective:
    """Streams over a frozen base model, marginal and parent-conditioned cross-entropy together."""

    def __init__(self, common: Common) -> None:
        self.common, self.done = common, 0.0
        self.packed = PackedStreams(common.backbone, common.adapters)

    def loss(self, batch: Sequence[Selection], seed: int) -> tuple[Tensor, Figures]:
        common, G = self.common, self.common.adapters.config.num_streams
        whole = targets(batch, G)
        head, vocabulary = common.head(whole.tokens[whole.valid], seed)
        mine, rows = workers.share(batch)
        wanted = whole.rows(rows)
        weights = stream_weights(whole.valid, common.alpha_decay)[rows][wanted.valid]
        part = common.stream_loss(
            self.packed.forward(common.pack(mine)), wanted, weights, head, vocabulary
        )
        return part.total, part.figures

    def evaluate(self, held_out: Sequence[Selection]) -> Figures:
        ranks = []
        for part in _parts(held_out):
            with torch.inference_mode():
                hidden = self.packed.forward(self.common.pack(part))
                ranks.append(rank_targets(self.packed, hidden, targets(part, hidden.shape[1])))
        return summarize(workers.gather(ranks))


class SharedObjective:
    """Main and streams share their LoRA and main attends to its streams: a different, fine-tuned model [SS §3.1.1].

    Every position of a completion has its streams, as at decoding, so whole texts are trained. Main's attention to its
    streams opens gently [own]: a score added to it rises from `gate_start` to zero over the first `gate_share` of the
    run, and is zero in the model that is written. With `streams=False` it is plain next-token LoRA, the yardstick.
    """

    def __init__(
        self,
        common: Common,
        main_weight: float = 1.0,
        stream_weight: float = 0.1,
        *,
        gate_start: float = 0.0,
        gate_share: float = 0.3,
        streams: bool = True,
    ) -> None:
        self.common = common
        self.joint = JointStreams(common.backbone, common.adapters, streams)
        self.packed = PackedStreams(common.backbone, common.adapters)
        self.main_weight, self.stream_weight = main_weight, stream_weight
        self.gate_start, self.gate_share = gate_start, gate_share
        self.done = 0.0

    @property
    def opening(self) -> float:
        """Return what is added to the scores that main gives its streams, now."""
        return (
            self.gate_start * max(0.0, 1 - self.done / self.gate_share) if self.gate_share else 0.0
        )

    def loss(self, batch: Sequence[Selection], seed: int) -> tuple[Tensor, Figures]:
        common, G = self.common, self.common.adapters.config.num_streams
        everything = [whole(s.example) for s in batch]
        answers = torch.tensor([token for s in everything for token in s.example.answer])
        head, vocabulary = common.head(answers, seed)
        valid = targets(everything, G).valid
        mine = everything[workers.rank() :: workers.count()]
        if not mine:
            return torch.zeros(()), {}
        out = self.joint.forward([s.example for s in mine], self.opening)
        tokens = vocabulary.index[torch.tensor([t for s in mine for t in s.example.answer])]
        share = torch.full((len(tokens),), self.main_weight / len(answers))
        total, losses = HeadCrossEntropy.apply(out.main, head, vocabulary.log_weight, tokens, share)
        figures: Figures = {"main_loss": round(float(losses.detach().mean()), 4)}
        if out.streams is not None:
            wanted = targets(mine, G)
            rows = wanted.valid
            weights = (self.stream_weight / valid.sum(0).clamp(min=1)).expand_as(rows)[rows]
            # An answer's last row has streams for main to attend to, but nothing left to foresee.
            has_target = torch.cat(
                [torch.arange(len(s.example.answer)) < len(s.example.positions) for s in mine]
            )
            part = common.stream_loss(out.streams[has_target], wanted, weights, head, vocabulary)
            total = total + part.total
            figures.update(part.figures)
        return total, figures

    def evaluate(self, held_out: Sequence[Selection]) -> Figures:
        ranks, counts = [], []
        for part in _parts(held_out):
            with torch.inference_mode():
                out = self.joint.forward([s.example for s in part])
                log_probs = self.common.backbone.head(out.main).float().log_softmax(-1)
            tokens = torch.tensor([t for s in part for t in s.example.answer])
            right = int((log_probs.argmax(-1) == tokens).sum())
            loss = -float(log_probs.gather(1, tokens[:, None]).sum())
            counts.append((right, loss, len(tokens)))
            if out.streams is None:
                continue
            start, rows = 0, []
            for selection in part:
                rows += [start + i for i in selection.rows]
                start += len(selection.example.answer)
            hidden = out.streams[torch.tensor(rows)]
            ranks.append(rank_targets(self.packed, hidden, targets(part, hidden.shape[1])))
        right, loss, count = (sum(values) for values in zip(*workers.gather(counts), strict=True))
        ranks = workers.gather(ranks)
        figures = {"main_top1": round(right / count, 4), "main_loss": round(loss / count, 4)}
        return {**(summarize(ranks) if ranks else {}), **figures}


def whole(example: Example) -> Selection:
    """Select every position of a text."""
    return Selection(example, tuple(example.positions))


class PrunerObjective:
    """Next-token cross-entropy of the early exit at the first MSA layer; everything else stays as it is."""

    def __init__(self, common: Common) -> None:
        assert common.adapters.pruner is not None
        self.common, self.done = common, 0.0

    def _exit(self, batch: Sequence[Selection]) -> tuple[Tensor, Tensor]:
        """Return normed early-exit states (n, h) and the tokens (n,) that follow."""
        rows = [self.common.base_states(s.example).hidden[s.rows] for s in batch]
        tokens = torch.tensor([s.example.answer[i] for s in batch for i in s.rows])
        main = torch.cat(rows)
        pruner = self.common.adapters.pruner
        assert pruner is not None
        return self.common.backbone.norm(main + pruner(main)), tokens

    def loss(self, batch: Sequence[Selection], seed: int) -> tuple[Tensor, Figures]:
        following = torch.tensor([s.example.answer[i] for s in batch for i in s.rows])
        head, vocabulary = self.common.head(following, seed)
        hidden, tokens = self._exit(workers.share(batch)[0])
        weights = torch.full((len(tokens),), 1 / len(following))
        total, losses = HeadCrossEntropy.apply(
            hidden, head, vocabulary.log_weight, vocabulary.index[tokens], weights
        )
        return total, {"loss": [round(float(losses.detach().mean()), 4)]}

    def evaluate(self, held_out: Sequence[Selection]) -> Figures:
        counts = []
        for part in _parts(held_out):
            with torch.inference_mode():
                hidden, tokens = self._exit(part)
                logits = self.common.backbone.head(hidden).float()
                best = (logits.topk(10).indices == tokens[:, None]).float()
                log_probs = logits.log_softmax(-1).gather(1, tokens[:, None])
                counts.append(
                    (
                        len(tokens),
                        float(-log_probs.sum()),
                        float(best[:, 0].sum()),
                        float(best.sum()),
                    )
                )
        n, loss, top1, top10 = (sum(values) for values in zip(*workers.gather(counts), strict=True))
        return {"positions": n, "loss": loss / n, "top1": top1 / n, "top10": top10 / n}


def mean_per_stream(losses: Tensor, stream: Tensor, num_streams: int) -> list[float]:
    """Return the mean loss of each stream; `stream` (R,) says which one a loss (R,) belongs to."""
    sums = torch.zeros(num_streams).scatter_add_(0, stream, losses.detach())
    counts = torch.bincount(stream, minlength=num_streams).clamp(min=1)
    return [round(float(value), 4) for value in sums / counts]


def _parts(held_out: Sequence[Selection]) -> list[Sequence[Selection]]:
    """Return this process's share of the held-out texts, a few at a time."""
    parts = [held_out[i : i + EVAL_TEXTS] for i in range(0, len(held_out), EVAL_TEXTS)]
    return parts[workers.rank() :: workers.count()]
