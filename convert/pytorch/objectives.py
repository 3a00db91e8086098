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

from mlx_specstream.convert.pytorch import workers
from mlx_specstream.convert.pytorch.adapters import StreamAdapters
from mlx_specstream.convert.pytorch.backbone import Backbone
from mlx_specstream.convert.pytorch.data import Example, Selection, Targets, targets
from mlx_specstream.convert.pytorch.loss import (
    HeadCrossEntropy,
    Vocabulary,
    VocabularySampler,
    stream_weights,
)
from mlx_specstream.convert.pytorch.measure import rank_targets, summarize
from mlx_specstream.convert.pytorch.model import SpeculativeModel
from mlx_specstream.convert.pytorch.packed import PackedBatch, PackedStreams
from mlx_specstream.convert.pytorch.states import States

Figures = dict[str, object]
EVAL_TEXTS = 8
"""Held-out texts measured together."""


class Objective(Protocol):
    """A loss over batches of selected positions."""

    def loss(self, batch: Sequence[Selection], seed: int) -> tuple[Tensor, Figures]:
        """Return this process's share of the loss, and figures of it; `seed` draws the vocabulary subset."""

    def evaluate(self, held_out: Sequence[Selection]) -> Figures:
        """Return held-out figures, the whole vocabulary counted; to be called on every process."""


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
            [torch.tensor(s.positions) for s in batch],
            [len(s.example.prompt) - 1 for s in batch],
        )

    def head(self, tokens: Tensor, seed: int) -> tuple[Tensor, Vocabulary]:
        """Return the head's rows (V', h) of a subset that holds `tokens`, and the subset."""
        vocabulary = self.sampler.draw(tokens, seed)
        return self.backbone.head_weight[vocabulary.ids], vocabulary


class LosslessObjective:
    """Streams over a frozen base model, marginal and parent-conditioned cross-entropy together."""

    def __init__(self, common: Common) -> None:
        self.common = common
        self.packed = PackedStreams(common.backbone, common.adapters)

    def loss(self, batch: Sequence[Selection], seed: int) -> tuple[Tensor, Figures]:
        common, G = self.common, self.common.adapters.config.num_streams
        whole = targets(batch, G)
        head, vocabulary = common.head(whole.tokens[whole.valid], seed)
        mine, rows = workers.share(batch)
        wanted = Targets(whole.tokens[rows], whole.parents[rows], whole.valid[rows])
        weights = stream_weights(whole.valid, common.alpha_decay)[rows][wanted.valid]
        places = vocabulary.index[wanted.tokens[wanted.valid]]
        hidden = self.packed.forward(common.pack(mine))[wanted.valid]
        stream = wanted.valid.nonzero()[:, 1]

        total, losses = HeadCrossEntropy.apply(hidden, head, vocabulary.log_weight, places, weights)
        figures: Figures = {"loss": mean_per_stream(losses, stream, G)}
        if common.adapters.conditioner is not None:
            parents = common.backbone.embed(wanted.parents[wanted.valid])
            corrected = common.adapters.conditioner(parents, hidden)
            extra, losses = HeadCrossEntropy.apply(
                corrected, head, vocabulary.log_weight, places, weights
            )
            total = total + extra
            figures["conditioned_loss"] = mean_per_stream(losses, stream, G)
        return total, figures

    def evaluate(self, held_out: Sequence[Selection]) -> Figures:
        ranks = []
        for part in _parts(held_out):
            with torch.inference_mode():
                hidden = self.packed.forward(self.common.pack(part))
                ranks.append(rank_targets(self.packed, hidden, targets(part, hidden.shape[1])))
        return summarize(workers.gather(ranks))


class SharedObjective:
    """Main and streams share their LoRA and main attends to its streams: a different, fine-tuned model [SS §3.1.1].

    Every position of a completion has its streams, as at decoding, so selections must hold all of them.
    """

    def __init__(
        self, common: Common, main_weight: float = 1.0, stream_weight: float = 0.1
    ) -> None:
        self.common = common
        self.model = SpeculativeModel(common.backbone, common.adapters)
        self.packed = PackedStreams(common.backbone, common.adapters)
        self.main_weight, self.stream_weight = main_weight, stream_weight

    def _forward(self, example: Example) -> tuple[Tensor, Tensor]:
        """Return normed main rows (A, h) and streams (A - 1, γ, h) of one text's answer."""
        first = len(example.prompt) - 1
        ids = torch.tensor([[*example.prompt, *example.answer[:-1]]])
        out = self.model.forward(ids, torch.arange(first, first + len(example.answer)))
        return out.main[0, first:], out.streams[0, :-1]

    def loss(self, batch: Sequence[Selection], seed: int) -> tuple[Tensor, Figures]:
        common, G = self.common, self.common.adapters.config.num_streams
        texts = [s.example for s in batch]
        answers = torch.tensor([token for text in texts for token in text.answer])
        head, vocabulary = common.head(answers, seed)
        everything = [Selection(text, tuple(range(text.num_positions))) for text in texts]
        valid = targets(everything, G).valid.sum(0).clamp(min=1)
        total = torch.zeros(())
        main_losses, stream_losses, streams = [], [], []
        for selection in everything[workers.rank() :: workers.count()]:
            main, hidden = self._forward(selection.example)
            wanted = targets([selection], G)
            stream = wanted.valid.nonzero()[:, 1]
            tokens = vocabulary.index[torch.tensor(selection.example.answer)]
            weights = torch.full((len(main),), self.main_weight / len(answers))
            part, losses = HeadCrossEntropy.apply(
                main, head, vocabulary.log_weight, tokens, weights
            )
            main_losses.append(losses)
            places = vocabulary.index[wanted.tokens[wanted.valid]]
            weights = (self.stream_weight / valid)[stream]
            more, losses = HeadCrossEntropy.apply(
                hidden[wanted.valid], head, vocabulary.log_weight, places, weights
            )
            stream_losses.append(losses)
            streams.append(stream)
            total = total + part + more
        if not main_losses:
            return total, {}
        figures: Figures = {
            "loss": mean_per_stream(torch.cat(stream_losses), torch.cat(streams), G)
        }
        figures["main_loss"] = round(float(torch.cat(main_losses).detach().mean()), 4)
        return total, figures

    def evaluate(self, held_out: Sequence[Selection]) -> Figures:
        ranks, right, count = [], 0, 0
        for part in _parts(held_out):
            for selection in part:
                with torch.inference_mode():
                    main, hidden = self._forward(selection.example)
                    guesses = self.common.backbone.head(main).argmax(-1)
                    right += int((guesses == torch.tensor(selection.example.answer)).sum())
                    count += len(guesses)
                    rows = torch.tensor(selection.positions)
                    ranks.append(
                        rank_targets(
                            self.packed, hidden[rows], targets([selection], hidden.shape[1])
                        )
                    )
        counts = workers.gather([(right, count)])
        main_top1 = sum(r for r, _ in counts) / max(1, sum(c for _, c in counts))
        return {**summarize(workers.gather(ranks)), "main_top1": round(main_top1, 4)}


class PrunerObjective:
    """Next-token cross-entropy of the early exit at the first MSA layer; everything else stays as it is."""

    def __init__(self, common: Common) -> None:
        assert common.adapters.pruner is not None
        self.common = common

    def _exit(self, batch: Sequence[Selection]) -> tuple[Tensor, Tensor]:
        """Return normed early-exit states (n, h) and the tokens (n,) that follow."""
        rows = [self.common.base_states(s.example).hidden[list(s.positions)] for s in batch]
        tokens = torch.tensor([s.example.answer[i] for s in batch for i in s.positions])
        main = torch.cat(rows)
        pruner = self.common.adapters.pruner
        assert pruner is not None
        return self.common.backbone.norm(main + pruner(main)), tokens

    def loss(self, batch: Sequence[Selection], seed: int) -> tuple[Tensor, Figures]:
        following = torch.tensor([s.example.answer[i] for s in batch for i in s.positions])
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
