"""Streams and their losses for one text, row by row in float64, with PyTorch's autograd.

Written from the paper's equations for the llama layout, without batches, masks, caches or any
code of the package: what training computes is held against this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten
from torch import Tensor

from mlx_specstream.config import StreamConfig


@dataclass
class PlainModel:
    """A llama of mlx-lm with its weights as float64 tensors, and stream weights beside them."""

    model: nn.Module
    config: StreamConfig
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.weights = {
            name: torch.tensor(np.array(value), dtype=torch.float64)
            for name, value in tree_flatten(self.model.parameters())
        }
        args = self.model.args
        self.N, self.H, self.K = (
            args.num_hidden_layers,
            args.num_attention_heads,
            args.num_key_value_heads,
        )
        self.D = args.head_dim or args.hidden_size // self.H
        self.theta, self.eps = args.rope_theta, args.rms_norm_eps
        self.first_msa = self.N - self.config.num_msa_layers

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean() + self.eps) * self.weights[f"{name}.weight"]

    def linear(self, layer: int, module: str, x: Tensor, stream: bool) -> Tensor:
        y = self.weights[f"model.layers.{layer}.{module}.weight"] @ x
        bias = self.weights.get(f"model.layers.{layer}.{module}.bias")
        y = y if bias is None else y + bias
        name = f"layers.{layer}.{module}"
        if stream and f"{name}.lora_a" in self.tensors:
            a, b = self.tensors[f"{name}.lora_a"], self.tensors[f"{name}.lora_b"]
            y = y + self.config.lora_scale * (x @ a) @ b
        return y

    def rope(self, x: Tensor, position: int) -> Tensor:
        half = self.D // 2
        angle = position * self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = torch.cos(angle), torch.sin(angle)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

    def project(self, layer: int, x: Tensor, position: int, stream: int) -> list[Tensor]:
        x = self.norm(x, f"model.layers.{layer}.input_layernorm")
        q, k, v = (
            self.linear(layer, f"self_attn.{m}_proj", x, stream > 0).view(-1, self.D) for m in "qkv"
        )
        if stream and self.config.value_rotation:
            angle = torch.tensor(self.config.value_rotation * stream)
            pairs = v.reshape(self.K, -1, 2)
            real, imaginary = pairs[..., 0], pairs[..., 1]
            v = torch.stack(
                [
                    real * torch.cos(angle) - imaginary * torch.sin(angle),
                    real * torch.sin(angle) + imaginary * torch.cos(angle),
                ],
                dim=-1,
            ).reshape(self.K, self.D)
        return [self.rope(q, position), self.rope(k, position), v]

    def finish(self, layer: int, x: Tensor, q: Tensor, seen: Sequence, stream: bool) -> Tensor:
        keys, values = torch.stack([k for k, _ in seen]), torch.stack([v for _, v in seen])
        heads = []
        for head in range(self.H):
            group = head // (self.H // self.K)
            weight = torch.softmax(keys[:, group] @ q[head] / self.D**0.5, dim=0)
            heads.append(weight @ values[:, group])
        x = x + self.linear(layer, "self_attn.o_proj", torch.cat(heads), stream)
        y = self.norm(x, f"model.layers.{layer}.post_attention_layernorm")
        gate, up = (self.linear(layer, f"mlp.{m}_proj", y, stream) for m in ("gate", "up"))
        inner = torch.nn.functional.silu(gate) * up
        return x + self.linear(layer, "mlp.down_proj", inner, stream)

    def run(self, tokens: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return normed main states (L, h) and normed stream states (n, γ, h)."""
        config, t = self.config, self.tensors
        embed = self.weights["model.embed_tokens.weight"]
        main = [embed[token] for token in tokens]
        streams: dict[tuple[int, int], Tensor] = {}
        for layer in range(self.N):
            if layer == self.first_msa:
                for p in positions:
                    start = main[p]
                    if config.stream_init_rank:
                        start = start + (start @ t["stream_init.lora_a"]) @ t["stream_init.lora_b"]
                    if config.next_token_rank:
                        e = embed[tokens[p + 1]]
                        e = e / torch.sqrt((e * e).mean() + 1e-6)
                        start = start + (e @ t["next_token.lora_a"]) @ t["next_token.lora_b"]
                    for j in range(1, config.num_streams + 1):
                        streams[p, j] = start + t["stream_embeddings"][j - 1]
            rows = [self.project(layer, x, p, 0) for p, x in enumerate(main)]
            seen = [(k, v) for _, k, v in rows]
            own = {}
            for (p, j), x in streams.items():
                at = p + j if config.rope_offset == "position_plus_stream" else p
                own[p, j] = self.project(layer, x, at, j)
            for (p, j), x in list(streams.items()):
                earlier = [tuple(own[p, i][1:]) for i in range(1, j + 1)]
                streams[p, j] = self.finish(layer, x, own[p, j][0], seen[: p + 1] + earlier, True)
            main = [
                self.finish(layer, x, rows[p][0], seen[: p + 1], False) for p, x in enumerate(main)
            ]
        final = torch.stack([self.norm(x, "model.norm") for x in main])
        G = config.num_streams
        rows = [
            torch.stack([self.norm(streams[p, j], "model.norm") for j in range(1, G + 1)])
            for p in positions
        ]
        return final, torch.stack(rows)

    def logits(self, x: Tensor) -> Tensor:
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return head @ x

    def corrected(self, parent: int, before: int, s: Tensor) -> Tensor:
        t = self.tensors
        embed = self.weights["model.embed_tokens.weight"]
        e, unit, g = (
            x / torch.sqrt((x * x).mean() + 1e-6) for x in (embed[parent], s, embed[before])
        )
        seen = torch.cat([e, unit, g][: 1 + self.config.conditioner_tokens])
        inner = torch.nn.functional.silu(t["conditioner.mlp_in"] @ seen)
        low = (e @ t["conditioner.lora_a"]) @ t["conditioner.lora_b"]
        return s + t["conditioner.mlp_out"] @ inner + low

    def loss(
        self, tokens: Sequence[int], positions: Sequence[int], weights: Sequence[float], soft: float
    ) -> Tensor:
        """Return Σ weights_j · (1 − soft)·CE + soft·CE to main's distribution, over all rows."""
        main, streams = self.run(tokens, positions)
        total = torch.zeros((), dtype=torch.float64)
        for n, t in enumerate(positions):
            for j in range(1, self.config.num_streams + 1):
                if t + 1 + j >= len(tokens):
                    continue
                wanted = torch.softmax(self.logits(main[t + j]).detach(), dim=-1)
                states = [streams[n, j - 1]]
                if self.config.conditioner_rank:
                    states.append(self.corrected(tokens[t + j], tokens[t + j - 1], states[0]))
                for state in states:
                    scores = torch.log_softmax(self.logits(state), dim=-1)
                    row = (soft - 1) * scores[tokens[t + 1 + j]] - soft * (wanted @ scores)
                    total = total + weights[j - 1] * row
        return total
