"""Attention of stream rows of many texts, one text's main keys and values at a time, its gradient written out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class Text:
    """One text's part of a packed layer: rows `start:stop`, main keys and values (K, S, D), hidden (n, S) bool."""

    start: int
    stop: int
    keys: Tensor
    values: Tensor
    hidden: Tensor


class StreamAttention(torch.autograd.Function):
    """Attention of stream rows to their text's main stream and their own earlier streams [SS Eq. 2].

    q: (R, H, D), k and v: (R, K, D) of the stream rows, R = N·γ. texts: for each text its main keys and values
    (K, S, D), how many positions it has, and (n, S) booleans: what each position may not see.
    Returns (R, H, D). Main keys and values get no gradient.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        texts: list[Text],
        num_streams: int,
        scale: float,
    ) -> Tensor:
        (R, H, D), K, G = q.shape, k.shape[1], num_streams
        g, N = H // K, R // num_streams
        # (K, N, g·γ, D): the query heads of a group and the streams of a position side by side
        rows = q.view(N, G, K, g, D).permute(2, 0, 3, 1, 4).reshape(K, N, g * G, D)
        ks, vs = (x.view(N, G, K, D).permute(2, 0, 1, 3).contiguous() for x in (k, v))
        own = torch.matmul(rows, ks.transpose(-1, -2)).mul_(scale).view(K, N, g, G, G)
        own.masked_fill_(torch.ones(G, G, dtype=torch.bool).triu(1), -torch.inf)
        own = own.view(K, N, g * G, G)
        out, probs = torch.empty_like(rows), []
        for text in texts:
            at = slice(text.start, text.stop)
            n, S = text.stop - text.start, text.keys.shape[1]
            scores = torch.bmm(rows[:, at].reshape(K, -1, D), text.keys.transpose(1, 2)).mul_(scale)
            scores = scores.view(K, n, g * G, S).masked_fill_(text.hidden[:, None], -torch.inf)
            prob = torch.cat((scores, own[:, at]), dim=-1).softmax(-1)
            main = torch.bmm(prob[..., :S].reshape(K, -1, S), text.values)
            torch.add(
                main.view(K, n, g * G, D), torch.matmul(prob[..., S:], vs[:, at]), out=out[:, at]
            )
            probs.append(prob)
        ctx.save_for_backward(rows, ks, vs, out, *probs)
        ctx.texts, ctx.shape, ctx.scale = texts, (R, H, K, D, G), scale
        return out.view(K, N, g, G, D).permute(1, 3, 0, 2, 4).reshape(R, H, D)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, ks, vs, out, *probs = ctx.saved_tensors
        R, H, K, D, G = ctx.shape
        g, N = H // K, R // G
        grad = grad.reshape(N, G, K, g, D).permute(2, 0, 3, 1, 4).reshape(K, N, g * G, D)
        inner = (grad * out).sum(-1, keepdim=True)
        grad_rows, own_probs = torch.empty_like(rows), torch.empty(K, N, g * G, G, dtype=rows.dtype)
        for text, prob in zip(ctx.texts, probs, strict=True):
            at = slice(text.start, text.stop)
            n, S = text.stop - text.start, text.keys.shape[1]
            main = prob[..., :S]
            slope = torch.bmm(grad[:, at].reshape(K, -1, D), text.values.transpose(1, 2)).view(
                K, n, g * G, S
            )
            slope.sub_(inner[:, at]).mul_(main)
            grad_rows[:, at] = torch.bmm(slope.view(K, -1, S), text.keys).view(K, n, g * G, D)
            own_probs[:, at] = prob[..., S:]
        own_slope = torch.matmul(grad, vs.transpose(-1, -2)).sub_(inner).mul_(own_probs)
        grad_rows.add_(torch.matmul(own_slope, ks)).mul_(ctx.scale)
        grad_k = torch.matmul(own_slope.transpose(-1, -2), rows).mul_(ctx.scale)
        grad_v = torch.matmul(own_probs.transpose(-1, -2), grad)
        grad_q = grad_rows.view(K, N, g, G, D).permute(1, 3, 0, 2, 4).reshape(R, H, D)
        grad_k, grad_v = (x.permute(1, 2, 0, 3).reshape(R, K, D) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None, None, None
