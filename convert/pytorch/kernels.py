"""Differentiable parts of a decoder layer with the gradients written out: fewer passes over memory than autograd's own.

LoRA is merged for the length of a step, W' = W + s·B·A in the compute dtype: forward and input gradients then cost what
the base model costs, and the adapters' own gradients need rank-wide products only,

    u = x A^T     g_u = s·g_y B     dB = s·g_y^T u     dA = g_u^T x     dx = g_y W'
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class MergedLinear(torch.autograd.Function):
    """y = x W'^T for W' = W + s·B·A, with gradients for x, A and B (see the module's docstring).

    x: (R, in). merged: (out, in). a: (r, in). b: (out, r), already times s. All of one dtype.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, merged: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, merged, a, b)
        return x @ merged.t()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        grad_b = grad.t() @ (x @ a.t())
        grad_a = (grad @ b).t() @ x
        return grad @ merged, None, grad_a, grad_b


class RMSNorm(torch.autograd.Function):
    """x / rms(x) · w with the statistic in float32. x: (..., width)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        scaled = grad * weight
        share = (
            (scaled * x).sum(-1, keepdim=True, dtype=inverse.dtype) * inverse.pow(3) / x.shape[-1]
        )
        return torch.addcmul(scaled * inverse, x, share, value=-1).to(x.dtype), None, None


class GatedSiLU(torch.autograd.Function):
    """silu(gate) · up of one matrix (R, 2m) = [gate | up] -> (R, m)."""

    @staticmethod
    def forward(ctx: FunctionCtx, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, nn.functional.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


class Rotate(torch.autograd.Function):
    """RoPE of x (R, heads, D) by cos and sin (R, 1, D/2); the gradient is turned back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.addcmul(first * cos, second, sin, value=-1, out=out[..., :half])
    torch.addcmul(second * cos, first, sin, out=out[..., half : 2 * half])
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
