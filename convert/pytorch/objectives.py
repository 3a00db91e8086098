"""What is minimised: lossless streams, shared streams, or the pruner.

| objective | trained | main rows | loss |
|---|---|---|---|
| `TorchLossless` | P_j, LoRA on stream rows, conditioner | frozen, from `states.py` | Σ α_j CE_j, and conditioned |
| `TorchShared` | P_j, LoRA on every row | computed, they see their streams | α_0 CE + Σ α_j CE_j [SS Eq. 5] |
| `TorchPruner` | the early-exit map alone | frozen, from `states.py` | CE of the next token [SS §3.1.3] |

Each one turns a batch of selected positions into a scalar to differentiate, figures for the log, and held-out figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...train.batches import Selection, shard
from ...train.data import Example
from ...train.figures import mean_per_stream, summarize
from ...train.targets import TargetRows, rows_of_batch, stream_weights, target_counts
from ...train.vocabulary import VocabularySampler
from . import workers
from .adapters import StreamAdapters
from .backbone import TorchBackbone
from .joint import JointStreams
from .loss import TorchHead
from .measure import rank_targets
from .packed import PackedBatch, PackedStreams
from .states import States

Figures = dict[str, object]
EVAL_TEXTS = 8
"""Held-out texts measured together."""


class Objective(Protocol):
    """A loss over batches of selected positions. done: how much of the run is behind, 0..1; the trainer sets it."""

    done: float

    def loss(self, batch: Sequence[Selection], seed: tuple[int, ...]) -> tuple[Tensor, Figures]:
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

    backbone: TorchBackbone
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

    def head(self, tokens: np.ndarray, seed: tuple[int, ...]) -> TorchHead:
        """Return the head of a part of the vocabulary that holds `tokens`."""
        return TorchHead.of(self.backbone, self.sampler.draw(tokens, seed))

    def stream_loss(
        self, streams: Tensor, rows: TargetRows, weights: np.ndarray, head: TorchHead
    ) -> StreamLoss:
        """Return the streams' loss, marginal and, with a conditioner, given the parents; sums of weighted rows.

        streams: (N, γ, h) normed. rows: those of them with a target. weights: (γ,), of a row of each.
        """
        hidden, G = streams.flatten(0, 1)[torch.from_numpy(rows.index)], streams.shape[1]
        row_weights = weights[rows.stream]
        total, losses = head.cross_entropy(hidden, rows.target, row_weights)
        figures: Figures = {"loss": mean_per_stream(losses, rows.stream, G)}
        if self.adapters.conditioner is not None:
            parents, before = (
                self.backbone.embed(torch.from_numpy(ids))
                for ids in (rows.parent, rows.grandparent)
            )
            corrected = self.adapters.conditioner(parents, hidden, before)
            extra, losses = head.cross_entropy(corrected, rows.target, row_weights)
            total = total + extra
            figures["conditioned_loss"] = mean_per_stream(losses, rows.stream, G)
        return StreamLoss(total, figures)


class TorchLossless:
    """Streams over a frozen base model, marginal and parent-conditioned cross-entropy together."""

    def __init__(self, common: Common) -> None:
        self.common, self.done = common, 0.0
        self.packed = PackedStreams(common.backbone, common.adapters)

    def loss(self, batch: Sequence[Selection], seed: tuple[int, ...]) -> tuple[Tensor, Figures]:
        common, G = self.common, self.common.adapters.config.num_streams
        whole = rows_of_batch(batch, G)
        head = common.head(whole.target, seed)
        mine, part = workers.share(batch)
        weights = stream_weights(target_counts(batch, G), common.alpha_decay)
        rows = whole.within(part.start * G, part.stop * G)
        streams = self.packed.forward(common.pack(mine))
        found = common.stream_loss(streams, rows, weights, head)
        return found.total, found.figures

    def evaluate(self, held_out: Sequence[Selection]) -> Figures:
        ranks = []
        for part in _parts(held_out):
            with torch.inference_mode():
                hidden = self.packed.forward(self.common.pack(part))
                ranks.append(
                    rank_targets(self.packed, hidden, rows_of_batch(part, hidden.shape[1]))
                )
        return summarize(workers.gather(ranks))


class TorchShared:
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

    def loss(self, batch: Sequence[Selection], seed: tuple[int, ...]) -> tuple[Tensor, Figures]:
        common, G = self.common, self.common.adapters.config.num_streams
        everything = [whole(s.example) for s in batch]
        answers = answer_tokens(everything)
        head = common.head(answers, seed)
        mine = shard(everything, workers.rank(), workers.count())
        if not mine:
            return torch.zeros(()), {}
        out = self.joint.forward([s.example for s in mine], self.opening)
        tokens = answer_tokens(mine)
        share = np.full(len(tokens), self.main_weight / len(answers), dtype=np.float32)
        total, losses = head.cross_entropy(out.main, tokens, share)
        figures: Figures = {"main_loss": round(float(losses.mean()), 4)}
        if out.streams is not None:
            counts = np.maximum(target_counts(everything, G), 1)
            weights = (self.stream_weight / counts).astype(np.float32)
            streams = out.streams[has_streams(mine)]
            part = common.stream_loss(streams, rows_of_batch(mine, G), weights, head)
            total = total + part.total
            figures.update(part.figures)
        return total, figures

    def evaluate(self, held_out: Sequence[Selection]) -> Figures:
        ranks, counts = [], []
        for part in _parts(held_out):
            with torch.inference_mode():
                out = self.joint.forward([s.example for s in part])
                log_probs = self.common.backbone.head(out.main).float().log_softmax(-1)
            tokens = torch.from_numpy(answer_tokens(part))
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
            ranks.append(rank_targets(self.packed, hidden, rows_of_batch(part, hidden.shape[1])))
        right, loss, count = (sum(values) for values in zip(*workers.gather(counts), strict=True))
        ranks = workers.gather(ranks)
        figures = {"main_top1": round(right / count, 4), "main_loss": round(loss / count, 4)}
        return {**(summarize(ranks) if ranks else {}), **figures}


def whole(example: Example) -> Selection:
    """Select every position of a text."""
    return Selection(example, tuple(example.positions))


def answer_tokens(batch: Sequence[Selection]) -> np.ndarray:
    """Return the answers' tokens, one text after another, int64."""
    return np.array([token for s in batch for token in s.example.answer], dtype=np.int64)


def has_streams(batch: Sequence[Selection]) -> Tensor:
    """Return which answer tokens' rows have something left to foresee: a text's last one has not."""
    parts = [torch.arange(len(s.example.answer)) < len(s.example.positions) for s in batch]
    return torch.cat(parts)


class TorchPruner:
    """Next-token cross-entropy of the early exit at the first MSA layer; everything else stays as it is."""

    def __init__(self, common: Common) -> None:
        assert common.adapters.pruner is not None
        self.common, self.done = common, 0.0

    def _exit(self, batch: Sequence[Selection]) -> Tensor:
        """Return the normed early-exit states of the selected positions, (n, h)."""
        rows = [self.common.base_states(s.example).hidden[s.rows] for s in batch]
        main = torch.cat(rows)
        pruner = self.common.adapters.pruner
        assert pruner is not None
        return self.common.backbone.norm(main + pruner(main))

    def loss(self, batch: Sequence[Selection], seed: tuple[int, ...]) -> tuple[Tensor, Figures]:
        everything, (mine, part) = next_tokens(batch), workers.share(batch)
        tokens = everything[part]
        weights = np.full(len(tokens), 1 / len(everything), dtype=np.float32)
        head = self.common.head(everything, seed)
        total, losses = head.cross_entropy(self._exit(mine), tokens, weights)
        return total, {"loss": [round(float(losses.mean()), 4)]}

    def evaluate(self, held_out: Sequence[Selection]) -> Figures:
        counts = []
        for part in _parts(held_out):
            with torch.inference_mode():
                hidden, tokens = self._exit(part), torch.from_numpy(next_tokens(part))
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


def next_tokens(batch: Sequence[Selection]) -> np.ndarray:
    """Return the token after every selected position, int64."""
    return np.array([s.example.answer[i] for s in batch for i in s.rows], dtype=np.int64)


def _parts(held_out: Sequence[Selection]) -> list[Sequence[Selection]]:
    """Return this process's share of the held-out texts, a few at a time."""
    parts = [held_out[i : i + EVAL_TEXTS] for i in range(0, len(held_out), EVAL_TEXTS)]
    return parts[workers.rank() :: workers.count()]
