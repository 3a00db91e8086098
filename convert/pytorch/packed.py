"""Stream rows of many texts in one batch: the fast forward of lossless training.

Main rows never depend on the streams, so only stream rows are computed here; the main stream's keys and values and the
hidden states where the streams start are given (`states.py`). Rows of all texts stand in one matrix (N·γ, h) without
padding, so that the large products see no waste; only attention looks at one text at a time:

    text a [n_a positions x γ rows]   keys: main 0..t of a, own streams 1..j
    text b [n_b positions x γ rows]   keys: main 0..t of b, own streams 1..j

LoRA is merged for the length of a step, W' = W + s·B·A in the compute dtype: forward and input gradients then cost what
the base model costs, and the adapters' own gradients need rank-wide products only,

    u = x A^T     g_u = s·g_y B     dB = s·g_y^T u     dA = g_u^T x     dx = g_y W'

Modules that read the same input (q, k, v; gate, up) are one product with a block-diagonal B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from mlx_specstream.convert.pytorch.adapters import StreamAdapters
from mlx_specstream.convert.pytorch.backbone import Backbone, DecoderLayer, Rotation
from mlx_specstream.convert.pytorch.model import rotate_values
from mlx_specstream.convert.pytorch.states import States
from mlx_specstream.errors import DataError


@dataclass(frozen=True)
class PackedBatch:
    """Stream positions of several texts.

    states: base states of each text. rows: (n_b,) int64 per text, which `states.hidden` rows get streams.
    first: position of `states.hidden[0]` in each text, i.e. prompt length - 1.
    """

    states: Sequence[States]
    rows: Sequence[Tensor]
    first: Sequence[int]

    @property
    def positions(self) -> Tensor:
        """Return t of every stream position, (N,)."""
        return torch.cat([rows + first for rows, first in zip(self.rows, self.first, strict=True)])


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


@dataclass(frozen=True)
class Text:
    """One text's part of a packed layer: rows `start:stop`, main keys and values (K, S, D), hidden (n, S) bool."""

    start: int
    stop: int
    keys: Tensor
    values: Tensor
    hidden: Tensor


class PackedStreams:
    """Stream rows of one model, batched; compute dtype is the backbone's, adapters stay float32."""

    def __init__(self, backbone: Backbone, adapters: StreamAdapters) -> None:
        self.backbone, self.adapters = backbone, adapters
        self.layers = range(adapters.first_msa_layer, len(backbone.layers))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return the streams' final normed hidden states, (N, γ, h)."""
        adapters, G = self.adapters, self.adapters.config.num_streams
        main = torch.cat([s.hidden[rows] for s, rows in zip(batch.states, batch.rows, strict=True)])
        x = adapters.start(main.to(self.backbone.dtype)).flatten(0, 1)
        cos, sin = self.backbone.rotation(adapters.positions(batch.positions).reshape(1, -1))
        half = cos.shape[-1] // 2
        rotation = (cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous())
        for number, index in enumerate(self.layers):
            x = self._layer(index, x, rotation, self._texts(batch, number, index))
        x = self._norm(self.backbone.model.model.norm, x)
        return x.view(-1, G, x.shape[-1])

    def _texts(self, batch: PackedBatch, number: int, index: int) -> list[Text]:
        texts, start, window = [], 0, self.backbone.window(index)
        for states, rows, first in zip(batch.states, batch.rows, batch.first, strict=True):
            t = (rows + first)[:, None]
            S = int(t[-1, 0]) + 1
            s = torch.arange(S)
            hidden = s > t
            if window is not None and S + self.adapters.config.num_streams > window:
                raise DataError(
                    f"a text of {S} tokens is longer than the model's window of {window}; cut it shorter."
                )
            texts.append(
                Text(
                    start,
                    start + len(rows),
                    states.keys[number, :, :S],
                    states.values[number, :, :S],
                    hidden,
                )
            )
            start += len(rows)
        return texts

    def _layer(self, index: int, x: Tensor, rotation: Rotation, texts: list[Text]) -> Tensor:
        layer, G = self.backbone.layers[index], self.adapters.config.num_streams
        H, K, D = layer.num_heads, layer.num_kv_heads, layer.head_dim
        attention, mlp = layer.attention, layer.module.mlp
        qkv = self._linear(index, layer, self._names(layer, "self_attn", ("q_proj", "k_proj", "v_proj")),
                           self._norm(layer.module.input_layernorm, x))  # fmt: skip
        q, k, v = (t.unflatten(-1, (-1, D)) for t in qkv.split((H * D, K * D, K * D), dim=-1))
        if hasattr(attention, "q_norm"):
            q, k = self._norm(attention.q_norm, q), self._norm(attention.k_norm, k)
        q, k = Rotate.apply(q, *rotation), Rotate.apply(k, *rotation)
        if self.adapters.config.value_rotation:
            angles = self.adapters.config.value_rotation * torch.arange(1, G + 1).repeat(
                len(x) // G
            )
            v = rotate_values(v.transpose(0, 1)[None], angles)[0].transpose(0, 1)
        attended = StreamAttention.apply(q, k, v, texts, G, layer.scale)
        x = x + self._linear(index, layer, ("self_attn.o_proj",), attended.flatten(1))
        both = self._linear(index, layer, self._names(layer, "mlp", ("gate_proj", "up_proj")),
                            self._norm(layer.module.post_attention_layernorm, x))  # fmt: skip
        activation = getattr(mlp, "act_fn", None) or mlp.activation_fn
        if isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation":
            inner = GatedSiLU.apply(both)
        else:
            gate, up = both.chunk(2, dim=-1)
            inner = activation(gate) * up
        return x + self._linear(index, layer, ("mlp.down_proj",), inner)

    @staticmethod
    def _names(layer: DecoderLayer, part: str, names: tuple[str, ...]) -> tuple[str, ...]:
        fused = {"self_attn": "self_attn.qkv_proj", "mlp": "mlp.gate_up_proj"}[part]
        return (
            (fused,)
            if fused in layer.linear_modules()
            else tuple(f"{part}.{name}" for name in names)
        )

    @staticmethod
    def _norm(module: nn.Module, x: Tensor) -> Tensor:
        return RMSNorm.apply(x, module.weight, module.variance_epsilon)

    def _linear(self, index: int, layer: DecoderLayer, names: tuple[str, ...], x: Tensor) -> Tensor:
        """Apply the modules `names`, which read the same x (R, in), as one product -> (R, Σ out)."""
        modules = layer.linear_modules()
        found = [modules[name] for name in names]
        deltas = [self.adapters.delta(index, name) for name in names]
        weight = found[0].weight if len(found) == 1 else torch.cat([m.weight for m in found])
        if all(delta is None for delta in deltas):
            y = x @ weight.t()
        else:
            blocks_a = [d.lora_A.weight if d else weight.new_zeros(0, x.shape[-1]) for d in deltas]
            blocks_b = [d.scale * d.lora_B.weight if d else m.weight.new_zeros(m.out_features, 0).float()
                        for m, d in zip(found, deltas, strict=True)]  # fmt: skip
            a, b = torch.cat(blocks_a).to(x.dtype), torch.block_diag(*blocks_b).to(x.dtype)
            with torch.no_grad():
                merged = torch.addmm(weight, b, a)
            y = MergedLinear.apply(x, merged, a, b)
        biases = [m.bias for m in found]
        return y if biases[0] is None else y + torch.cat(biases)
