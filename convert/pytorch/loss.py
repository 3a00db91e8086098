"""Cross-entropy under the frozen LM head, whole or for some tokens (`mlx_specstream.train.vocabulary`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ...train.vocabulary import Vocabulary
from .backbone import TorchBackbone

CHUNK = 512
"""Rows whose logits exist at the same time."""


@dataclass(frozen=True)
class TorchHead:
    """The head's rows (V', h) of some tokens, what is added to their logits (V',), and a token's place."""

    rows: Tensor
    bias: Tensor
    place: np.ndarray | None = None

    @classmethod
    def of(cls, backbone: TorchBackbone, vocabulary: Vocabulary | None) -> TorchHead:
        """Return the head of some tokens; None: of all."""
        if vocabulary is None:
            return cls(backbone.head_weight, torch.zeros(backbone.vocab_size))
        rows = backbone.head_weight[torch.from_numpy(vocabulary.tokens)]
        return cls(rows, torch.from_numpy(vocabulary.bias), vocabulary.place)

    def cross_entropy(
        self, hidden: Tensor, targets: np.ndarray, weights: np.ndarray
    ) -> tuple[Tensor, np.ndarray]:
        """Return Σ weights · losses of rows (R, h) and, for the record, their losses (R,)."""
        places = torch.from_numpy(
            np.asarray(targets if self.place is None else self.place[targets])
        )
        shares = torch.from_numpy(weights)
        total, losses = HeadCrossEntropy.apply(hidden, self.rows, self.bias, places.long(), shares)
        return total, losses.detach().numpy()


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
