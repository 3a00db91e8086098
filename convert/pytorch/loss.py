"""The training loss of lossless mode [SS §3.2, Eq. 5], at a fraction of the vocabulary head's price.

    loss = Σ_j α_j CE(stream j, x_{t+1+j})  +  Σ_j α_j CE(conditioned stream j | x_{t+j}, x_{t+1+j}),  α_j ∝ 0.8^(j-1)

The full vocabulary would cost as much as the layers. Each step uses a subset: every target of the batch, the most
frequent tokens of the training text, and a random sample of the others, whose logits are raised by log(others / sample)
so that the sampled partition sum is an unbiased estimate of the whole one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

CHUNK = 512
"""Rows whose logits exist at the same time."""


@dataclass(frozen=True)
class Vocabulary:
    """A subset of the vocabulary: ids (V',) int64, log_weight (V',) float32, index (V,) -> place in ids or -1."""

    ids: Tensor
    log_weight: Tensor
    index: Tensor


class VocabularySampler:
    """Draws each step's subset."""

    def __init__(
        self, vocab_size: int, texts: Iterable[Iterable[int]], num_frequent: int, num_random: int
    ) -> None:
        counts = Counter(token for text in texts for token in text)
        self.vocab_size, self.num_random = vocab_size, num_random
        self.frequent = torch.tensor(
            [token for token, _ in counts.most_common(num_frequent)], dtype=torch.long
        )

    def draw(self, targets: Tensor, seed: int) -> Vocabulary:
        """Return targets ∪ frequent ∪ random others; the whole vocabulary if that is not larger."""
        chosen = torch.zeros(self.vocab_size, dtype=torch.bool)
        chosen[targets.unique()] = True
        chosen[self.frequent] = True
        fixed = chosen.nonzero()[:, 0]
        others = (~chosen).nonzero()[:, 0]
        if self.num_random < len(others):
            generator = torch.Generator().manual_seed(seed)
            sample = others[
                torch.randint(len(others), (self.num_random,), generator=generator)
            ].unique()
        else:
            sample = others
        ids = torch.cat((fixed, sample))
        log_weight = torch.zeros(len(ids))
        if len(sample):
            log_weight[len(fixed) :] = torch.log(torch.tensor(len(others) / len(sample)))
        index = torch.full((self.vocab_size,), -1)
        index[ids] = torch.arange(len(ids))
        return Vocabulary(ids, log_weight, index)


class HeadCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy of rows under a frozen head, in chunks; the gradient is made on the way forward.

    hidden: (R, h) normed states. head: (V', h). bias: (V',) float32. targets: (R,) places in the head. weights: (R,).
    Returns (R,) float32 losses, unweighted, for the record; the gradient is that of Σ weights · losses.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor,
        targets: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        grad, losses = torch.empty_like(hidden), torch.empty(len(hidden))
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = (hidden[rows] @ head.t()).float().add_(bias)
            log_sum = logits.logsumexp(-1, keepdim=True)
            target = targets[rows, None]
            losses[rows] = (log_sum - logits.gather(1, target))[:, 0]
            slope = logits.sub_(log_sum).exp_()
            slope.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
            slope.mul_(weights[rows, None])
            grad[rows] = slope.to(head.dtype) @ head
        ctx.save_for_backward(grad)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: FunctionCtx, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None, None


def stream_weights(valid: Tensor, decay: float) -> Tensor:
    """Return each row's share of the loss, (N, γ): α_j over the number of valid rows of stream j; Σ_j α_j = 1."""
    alpha = decay ** torch.arange(valid.shape[1], dtype=torch.float32)
    alpha = alpha / alpha.sum()
    return valid * (alpha / valid.sum(0).clamp(min=1))
