"""The reference: Speculative Streaming over a Hugging Face decoder, one dense pass, nothing clever.

What every parity test compares with, so it is short rather than fast: all rows of the MSA layers stand in one
sequence under one explicit mask (`masks.py`).

Main rows may form a draft tree instead of a text: pass `positions` and the ancestors' `mask`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters import StreamAdapters
from .backbone import Linear, TorchBackbone, attend
from .masks import stream_mask


@dataclass(frozen=True)
class StreamOutput:
    """One pass of the model; main and streams are normed, ready for the head.

    main: (B, L, h). streams: (B, n, γ, h). insertion: (B, L, h), the main rows where the streams start.
    """

    main: Tensor
    streams: Tensor
    insertion: Tensor


class SpeculativeModel:
    """A base model and its streams; `gates` (H,) by layer are added to main rows' scores of them."""

    def __init__(
        self,
        backbone: TorchBackbone,
        adapters: StreamAdapters,
        gates: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.backbone, self.adapters, self.gates = backbone, adapters, gates or {}
        self.config = adapters.config

    def linear(self, layer: int, first: int) -> Linear:
        """Return layer `layer`'s linear: the base model's, plus LoRA on the rows from `first` on."""

        def adapted(name: str, module: nn.Linear, x: Tensor) -> Tensor:
            y, delta = module(x), self.adapters.delta(layer, name)
            if delta is None or first == x.shape[1]:
                return y
            return torch.cat((y[:, :first], y[:, first:] + delta(x[:, first:])), dim=1)

        return adapted

    def forward(
        self,
        ids: Tensor,
        at: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        following: Tensor | None = None,
    ) -> StreamOutput:
        """Run the model once.

        Args:
            ids: (B, L) int64.
            at: (n,) rows that get streams; all by default.
            positions: (B, L) RoPE positions of the rows; 0 .. L-1 by default.
            mask: (B or 1, L, L) boolean, who sees whom among main rows; causal by default.
            following: (B, n), the tokens after the rows `at`, for streams that know them.
        """
        B, L = ids.shape
        backbone, shared, G = self.backbone, self.config.mode == "shared", self.config.num_streams
        at = torch.arange(L) if at is None else at
        positions = torch.arange(L).expand(B, L) if positions is None else positions
        mask = torch.ones(1, L, L, dtype=torch.bool).tril() if mask is None else mask
        n, split = len(at), self.adapters.first_msa_layer

        x, rotation = backbone.embed(ids), backbone.rotation(positions)
        for index in range(split):
            linear = self.linear(index, 0 if shared else L)
            q, k, v = backbone.layers[index].queries_keys_values(x, rotation, linear)
            seen = self._in_window(mask, positions, index)
            x = backbone.layers[index].finish(
                x, attend(q, k, v, seen[:, None], backbone.layers[index].scale), linear
            )
        insertion = x

        known = None if following is None else backbone.embed(following)
        x = torch.cat((x, self.adapters.start(x[:, at], known).flatten(1, 2)), dim=1)
        positions = torch.cat(
            (positions, self.adapters.positions(positions[:, at]).reshape(B, -1)), dim=1
        )
        mask, rotation = stream_mask(mask, at, G, shared), backbone.rotation(positions)
        angles = self.config.value_rotation * torch.arange(1, G + 1).repeat(n)
        for index in range(split, len(backbone.layers)):
            linear = self.linear(index, 0 if shared else L)
            q, k, v = backbone.layers[index].queries_keys_values(x, rotation, linear)
            if self.config.value_rotation:
                v = torch.cat((v[:, :, :L], rotate_values(v[:, :, L:], angles)), dim=2)
            seen = self._gated(self._in_window(mask, positions, index)[:, None], index, L)
            x = backbone.layers[index].finish(
                x, attend(q, k, v, seen, backbone.layers[index].scale), linear
            )
        x = backbone.norm(x)
        return StreamOutput(x[:, :L], x[:, L:].unflatten(1, (n, G)), insertion)

    def _gated(self, seen: Tensor, layer: int, num_main: int) -> Tensor:
        """Return `seen` (B, 1, R, S), or with a gate in this layer scores to add (B, H, R, S)."""
        gate = self.gates.get(layer)
        if gate is None:
            return seen
        bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).repeat(1, len(gate), 1, 1)
        bias[:, :, :num_main, num_main:] += gate[:, None, None]
        return bias

    def _in_window(self, mask: Tensor, positions: Tensor, layer: int) -> Tensor:
        window = self.backbone.window(layer)
        if window is None:
            return mask
        return mask & (positions[:, :, None] - positions[:, None, :] < window)


def rotate_values(values: Tensor, angles: Tensor) -> Tensor:
    """Multiply values (B, K, R, D) by e^{iθ}, θ (R,), neighbouring channels as complex numbers [SS Eq. 9]."""
    cos, sin = angles.cos()[:, None].to(values.dtype), angles.sin()[:, None].to(values.dtype)
    real, imaginary = values.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(
        (real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1
    ).flatten(-2)
