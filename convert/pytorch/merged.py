"""Decoder layers over rows of many texts in one matrix (R, h), without padding, LoRA merged for the length of a step.

Modules that read the same input (q, k, v; gate, up) are one product, W' = W + s·B·A with a block-diagonal B
(`kernels.py`). Who attends to whom is the caller's business.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapters import StreamAdapters
from .backbone import DecoderLayer, Rotation, TorchBackbone
from .kernels import GatedSiLU, MergedLinear, RMSNorm, Rotate


class MergedLayers:
    """One model's layers with its adapters; compute dtype is the backbone's, adapters stay float32."""

    def __init__(self, backbone: TorchBackbone, adapters: StreamAdapters) -> None:
        self.backbone, self.adapters = backbone, adapters

    def rotation(self, positions: Tensor) -> Rotation:
        """Return cos and sin (R, 1, D_rope / 2) for `positions` (R,)."""
        cos, sin = self.backbone.rotation(positions.reshape(1, -1))
        half = cos.shape[-1] // 2
        return cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()

    def queries_keys_values(
        self, index: int, x: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project rows (R, h) to rotated queries (R, H, D), rotated keys and values (R, K, D)."""
        layer = self.backbone.layers[index]
        H, K, D = layer.num_heads, layer.num_kv_heads, layer.head_dim
        attention = layer.attention
        names = self._names(layer, "self_attn", ("q_proj", "k_proj", "v_proj"))
        qkv = self._linear(index, layer, names, self._norm(layer.module.input_layernorm, x))
        q, k, v = (t.unflatten(-1, (-1, D)) for t in qkv.split((H * D, K * D, K * D), dim=-1))
        if hasattr(attention, "q_norm"):
            q, k = self._norm(attention.q_norm, q), self._norm(attention.k_norm, k)
        return Rotate.apply(q, *rotation), Rotate.apply(k, *rotation), v

    def finish(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's output (R, H·D) and the MLP to the residual (R, h)."""
        layer = self.backbone.layers[index]
        mlp = layer.module.mlp
        x = x + self._linear(index, layer, ("self_attn.o_proj",), attended)
        names = self._names(layer, "mlp", ("gate_proj", "up_proj"))
        both = self._linear(
            index, layer, names, self._norm(layer.module.post_attention_layernorm, x)
        )
        activation = getattr(mlp, "act_fn", None) or mlp.activation_fn
        if isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation":
            inner = GatedSiLU.apply(both)
        else:
            gate, up = both.chunk(2, dim=-1)
            inner = activation(gate) * up
        return x + self._linear(index, layer, ("mlp.down_proj",), inner)

    def final_norm(self, x: Tensor) -> Tensor:
        """Return rows (R, h) normed for the head."""
        return self._norm(self.backbone.model.model.norm, x)

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
