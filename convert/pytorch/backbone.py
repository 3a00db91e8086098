"""A view of a Hugging Face decoder: its own modules, with our attention in between.

Knows the layer (norm, projections, RoPE, attention, MLP); knows nothing about streams. Nothing is forked: every weight
is used through the module that `transformers` made, so a new release of a supported family keeps working.

    embed -> [ input norm -> q, k, v -> rope -> attend -> o_proj -> + -> norm -> mlp -> + ] x N -> norm -> head

Callers pass the rotation (positions may differ from row to row) and the mask (any boolean pattern), and may replace
every linear layer by `linear(name, module, x)`, which is how the stream adapters of `model.py` come in.

Dimensions: B batch, L query rows, S key rows, H query heads, K key heads, D head width, h hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ModelError

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")

Rotation = tuple[Tensor, Tensor]
"""cos and sin, both (B, L, D_rope), in the dtype of the hidden states."""

Linear = Callable[[str, nn.Linear, Tensor], Tensor]
"""Computes `module(x)` or something near it; `name` is the module's path inside the layer."""


def plain_linear(_: str, module: nn.Linear, x: Tensor) -> Tensor:
    """Return `module(x)`: the base model's own linear layer."""
    return functional.linear(x, module.weight, module.bias)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first D_rope channels of `x` (B, heads, L, D), pairs being (i, i + D_rope / 2)."""
    cos, sin = (table.unsqueeze(1) for table in rotation)
    width = cos.shape[-1]
    head, tail = x[..., :width], x[..., width:]
    first, second = head.chunk(2, dim=-1)
    turned = head * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if tail.shape[-1] == 0 else torch.cat((turned, tail), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend with an arbitrary mask.

    Args:
        q: (B, H, L, D). k, v: (B, K, S, D) with H a multiple of K.
        mask: boolean, broadcastable to (B, 1, L, S); true where a row may look.

    Returns:
        (B, L, H * D)
    """
    B, H, L, D = q.shape
    groups = H // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(B, L, H * D)


class DecoderLayer:
    """One layer of the base model, taken apart at the attention."""

    def __init__(self, module: nn.Module, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.module = module
        self.attention: nn.Module = module.self_attn
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = float(getattr(self.attention, "scaling", head_dim**-0.5))
        self.fused_qkv = hasattr(self.attention, "qkv_proj")

    def linear_modules(self) -> dict[str, nn.Linear]:
        """Return the layer's linear layers by path: `self_attn.q_proj`, `mlp.down_proj` ..."""
        return {name: m for name, m in self.module.named_modules() if isinstance(m, nn.Linear)}

    def queries_keys_values(
        self, x: Tensor, rotation: Rotation, linear: Linear = plain_linear
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project the residual `x` (B, L, h) to rotated queries (B, H, L, D), rotated keys, values (B, K, L, D)."""
        B, L, _ = x.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        x = self.module.input_layernorm(x)
        if self.fused_qkv:
            fused = linear("self_attn.qkv_proj", self.attention.qkv_proj, x)
            q, k, v = fused.split((H * D, K * D, K * D), dim=-1)
        else:
            q, k, v = (
                linear(f"self_attn.{name}", getattr(self.attention, name), x)
                for name in ("q_proj", "k_proj", "v_proj")
            )
        q, k, v = q.view(B, L, H, D), k.view(B, L, K, D), v.view(B, L, K, D)
        if hasattr(self.attention, "q_norm"):
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return rotate(q, rotation), rotate(k, rotation), v

    def finish(self, residual: Tensor, attended: Tensor, linear: Linear = plain_linear) -> Tensor:
        """Add the attention's output (B, L, H * D) and the MLP to the residual (B, L, h)."""
        residual = residual + linear("self_attn.o_proj", self.attention.o_proj, attended)
        x = self.module.post_attention_layernorm(residual)
        mlp = self.module.mlp
        if hasattr(mlp, "gate_up_proj"):
            gate, up = linear("mlp.gate_up_proj", mlp.gate_up_proj, x).chunk(2, dim=-1)
            activation = mlp.activation_fn
        else:
            gate = linear("mlp.gate_proj", mlp.gate_proj, x)
            up = linear("mlp.up_proj", mlp.up_proj, x)
            activation = mlp.act_fn
        return residual + linear("mlp.down_proj", mlp.down_proj, activation(gate) * up)


class TorchBackbone:
    """A `...ForCausalLM` model of a supported family, seen as embed, layers, norm and head."""

    def __init__(self, model: nn.Module) -> None:
        config = model.config
        if config.model_type not in SUPPORTED_FAMILIES:
            known = ", ".join(SUPPORTED_FAMILIES)
            raise ModelError(
                f"model_type {config.model_type!r} is not supported here; expected one of {known}."
            )
        self.model, self.config = model, config
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.layers = [
            DecoderLayer(layer, config.num_attention_heads, self.num_kv_heads, self.head_dim)
            for layer in model.model.layers
        ]

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> TorchBackbone:
        """Load a local model folder, frozen and in evaluation mode."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, local_files_only=True)
        return cls(model.eval().requires_grad_(False))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.model.embed_tokens.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary head's rows, (V, h); the embedding table itself when tied."""
        return self.model.lm_head.weight

    def embed(self, ids: Tensor) -> Tensor:
        """Look up `ids` (B, L) -> (B, L, h)."""
        return self.model.model.embed_tokens(ids)

    def rotation(self, positions: Tensor) -> Rotation:
        """Return cos and sin for `positions` (B, L), one position per row, by the model's own rule."""
        cos, sin = self.model.model.rotary_emb(torch.empty(0, device=positions.device), positions)
        return cos.to(self.dtype), sin.to(self.dtype)

    def window(self, layer: int) -> int | None:
        """Return how many positions layer `layer` looks back, itself included; None means all."""
        size = getattr(self.config, "sliding_window", None)
        if size is None or getattr(self.config, "use_sliding_window", True) is False:
            return None
        types = getattr(self.config, "layer_types", None)
        return None if types is not None and types[layer] != "sliding_attention" else int(size)

    def norm(self, x: Tensor) -> Tensor:
        return self.model.model.norm(x)

    def head(self, x: Tensor) -> Tensor:
        """Return logits (..., V) of already normed hidden states (..., h)."""
        return self.model.lm_head(x)
