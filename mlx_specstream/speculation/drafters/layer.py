"""A decoder layer that a drafter has of its own, of Llama's form, and the loading of its weights."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from ...config import LayerConfig
from ...model.backbone import RowRope
from ...model.cache import LayerView


class DraftAttention(nn.Module):
    """Grouped attention over rows of `width`, each at its own position."""

    def __init__(self, config: LayerConfig, width: int) -> None:
        super().__init__()
        from mlx_lm.models.rope_utils import initialize_rope

        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = H, K, D
        self.q_proj = nn.Linear(width, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, config.hidden_size, bias=False)
        scaling = None if config.rope_scaling is None else dict(config.rope_scaling)
        rope = initialize_rope(D, config.rope_theta, False, scaling, config.max_position_embeddings)
        self.rope = RowRope(rope)

    def __call__(self, x: mx.array, mask: mx.array | None, cache: LayerView) -> mx.array:
        """Return what rows (1, R, width) gather, (1, R, h); mask: (R, S) bool over all keys."""
        B, R, _ = x.shape
        heads = lambda y, count: y.reshape(B, R, count, -1).transpose(0, 2, 1, 3)  # noqa: E731
        queries = self.rope(heads(self.q_proj(x), self.num_heads), offset=cache.offset)
        keys = self.rope(heads(self.k_proj(x), self.num_kv_heads), offset=cache.offset)
        values = heads(self.v_proj(x), self.num_kv_heads)
        keys, values = cache.update_and_fetch(keys, values)
        out = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=self.head_dim**-0.5, mask=mask
        )
        joined: mx.array = self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, R, -1))
        return joined


class DraftMLP(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        h, m = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(h, m, bias=False)
        self.up_proj = nn.Linear(h, m, bias=False)
        self.down_proj = nn.Linear(m, h, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        down: mx.array = self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class DraftLayer(nn.Module):
    """Attention and MLP, each added to what it reads; `norms` are names of norms at the input.

    width: of the rows that attention reads, which need not be the residual's.
    """

    def __init__(self, config: LayerConfig, width: int, norms: tuple[str, ...] = ()) -> None:
        super().__init__()
        h, eps = config.hidden_size, config.rms_norm_eps
        for name in norms:
            self[name] = nn.RMSNorm(h, eps)
        self.self_attn = DraftAttention(config, width)
        self.post_attention_layernorm = nn.RMSNorm(h, eps)
        self.mlp = DraftMLP(config)

    def __call__(
        self, residual: mx.array, rows: mx.array, mask: mx.array | None, cache: LayerView
    ) -> mx.array:
        """Return rows (1, R, h): residual (1, R, h) and what attention to `rows` adds, then the MLP."""
        hidden = residual + self.self_attn(rows, mask, cache)
        added: mx.array = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + added


def with_weights(module: nn.Module, tensors: Mapping[str, mx.array], dtype: mx.Dtype) -> None:
    """Put tensors into a module under its parameters' names, floats as `dtype`."""
    module.load_weights([(name, tensor.astype(dtype)) for name, tensor in tensors.items()])
    mx.eval(module.parameters())
