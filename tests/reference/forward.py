"""A whole multi-stream forward in float64 NumPy, row by row, from the weights of an mlx-lm model.

Every row is a small object that knows its position and the rows it sees; attention is a loop over
them. Nothing here shares code, masks or row orders with the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_specstream.config import StreamConfig

Array = np.ndarray


@dataclass
class Row:
    """One row of the pass. `stream` is 0 for the main stream, j for S_j."""

    position: int
    stream: int
    hidden: Array
    sees: list[Row] = field(default_factory=list)
    key: Array = field(default_factory=lambda: np.zeros(0))
    value: Array = field(default_factory=lambda: np.zeros(0))


def _f64(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _norm(x: Array, module: Any) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + module.eps) * _f64(module.weight)


def _rope(x: Array, position: int, base: float) -> Array:
    """Rotate heads (H, D): channel i with channel i + D/2."""
    half = x.shape[-1] // 2
    angle = position * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


class Reference:
    """A llama, mistral, qwen2 or qwen3 model of mlx-lm with plain RoPE, and its streams."""

    def __init__(
        self, model: nn.Module, config: StreamConfig, tensors: dict[str, mx.array]
    ) -> None:
        self.model, self.config = model, config
        self.tensors = {name: _f64(tensor) for name, tensor in tensors.items()}
        self.first_msa = len(model.layers) - config.num_msa_layers

    def _linear(self, layer: int, name: str, row: Row, x: Array) -> Array:
        part, leaf = name.split(".")
        module = self.model.layers[layer][part][leaf]
        y = _f64(module.weight) @ x
        if "bias" in module:
            y = y + _f64(module.bias)
        shared = self.config.mode == "shared"
        adapted = shared or (row.stream > 0 and layer >= self.first_msa)
        if adapted and name in self.config.target_modules:
            a, b = (self.tensors[f"layers.{layer}.{name}.lora_{x}"] for x in "ab")
            y = y + self.config.lora_alpha / self.config.lora_rank * (b.T @ (a.T @ x))
        return y

    def _layer(self, index: int, rows: list[Row]) -> None:
        block, args = self.model.layers[index], self.model.args
        H, K = args.num_attention_heads, args.num_key_value_heads
        attention = block.self_attn
        queries = []
        for row in rows:
            x = _norm(row.hidden, block.input_layernorm)
            q, k, v = (self._linear(index, f"self_attn.{n}_proj", row, x) for n in "qkv")
            q, k, v = q.reshape(H, -1), k.reshape(K, -1), v.reshape(K, -1)
            if "q_norm" in attention:
                q, k = _norm(q, attention.q_norm), _norm(k, attention.k_norm)
            queries.append(_rope(q, row.position, args.rope_theta))
            row.key = _rope(k, row.position, args.rope_theta)
            row.value = v
            if row.stream and self.config.value_rotation:
                turned = (v[:, 0::2] + 1j * v[:, 1::2]) * np.exp(
                    1j * self.config.value_rotation * row.stream
                )
                row.value = np.stack([turned.real, turned.imag], axis=-1).reshape(v.shape)
        outputs = []
        window = getattr(self.model.args, "sliding_window", None)
        near = window if window and getattr(block, "use_sliding", False) else 10**9
        for row, q in zip(rows, queries, strict=True):
            seen = [other for other in row.sees if row.position - other.position < near]
            heads = []
            for head in range(H):
                group = head // (H // K)
                scores = np.array([q[head] @ other.key[group] for other in seen])
                scores = scores / np.sqrt(q.shape[-1])
                gate = self.tensors.get(f"layers.{index}.stream_gate")
                if gate is not None and row.stream == 0:
                    scores = scores + gate[head] * np.array([o.stream > 0 for o in seen])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                heads.append(sum(w * o.value[group] for w, o in zip(weights, seen, strict=True)))
            outputs.append(np.concatenate(heads))
        for row, attended in zip(rows, outputs, strict=True):
            h = row.hidden + self._linear(index, "self_attn.o_proj", row, attended)
            x = _norm(h, block.post_attention_layernorm)
            gate = self._linear(index, "mlp.gate_proj", row, x)
            up = self._linear(index, "mlp.up_proj", row, x)
            down = self._linear(index, "mlp.down_proj", row, gate / (1 + np.exp(-gate)) * up)
            row.hidden = h + down

    def run(
        self,
        prefix: Sequence[int],
        tokens: Sequence[int],
        parents: Sequence[int],
        following: Sequence[int] = (),
    ) -> tuple[Array, Array, list[tuple[Array, Array]]]:
        """Run a tree of `tokens` after `prefix`; the tree's nodes have streams, the prefix none.

        following: the token after each node, for streams that know it.

        Returns main rows (T, h) and streams (T, γ, h) after the final norm, and per layer the
        keys and values (T, K, D) of the tree's main rows.
        """
        config, rows = self.config, []
        embedding = _f64(self.model.model.embed_tokens.weight)
        for position, token in enumerate(prefix):
            row = Row(position, 0, embedding[token])
            row.sees = [*rows, row]
            rows.append(row)
        nodes: list[Row] = []
        for token, parent in zip(tokens, parents, strict=True):
            above = nodes[parent] if nodes else None
            at = above.position + 1 if above else len(prefix)
            row = Row(at, 0, embedding[token])
            row.sees = [*(above.sees if above else rows), row]
            nodes.append(row)
        lines: list[tuple[Array, Array]] = []

        def keep_lines() -> None:
            keys = np.stack([node.key for node in nodes])
            lines.append((keys, np.stack([node.value for node in nodes])))

        for index in range(self.first_msa):
            self._layer(index, rows + nodes)
            keep_lines()
        streams: list[list[Row]] = []
        for number, node in enumerate(nodes):
            start = node.hidden
            if config.stream_init_rank:
                a, b = self.tensors["stream_init.lora_a"], self.tensors["stream_init.lora_b"]
                start = start + b.T @ (a.T @ start)
            if config.next_token_rank:
                a, b = self.tensors["next_token.lora_a"], self.tensors["next_token.lora_b"]
                row = embedding[following[number]]
                start = start + b.T @ (a.T @ (row / np.sqrt((row * row).mean() + 1e-6)))
            own: list[Row] = []
            for j in range(1, config.num_streams + 1):
                offset = j if config.rope_offset == "position_plus_stream" else 0
                row = Row(
                    node.position + offset, j, start + self.tensors["stream_embeddings"][j - 1]
                )
                row.sees = [*node.sees, *own, row]
                own.append(row)
            streams.append(own)
        if config.mode == "shared":
            for node, own in zip(nodes, streams, strict=True):
                node.sees = node.sees + own
        everything = rows + nodes + [row for own in streams for row in own]
        for index in range(self.first_msa, len(self.model.layers)):
            self._layer(index, everything)
            keep_lines()
        final = self.model.model.norm
        main = np.stack([_norm(node.hidden, final) for node in nodes])
        out = np.stack([[_norm(row.hidden, final) for row in own] for own in streams])
        return main, out, lines
