"""A GPU that takes float32 factors at 10 bits in products of several rows, imitated on the CPU.

M5 and NVIDIA GPUs do so by default (TF32): a product of one row stays exact, so that plain decoding
and a verifying pass round differently.
"""

from __future__ import annotations

import platform

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_specstream.machine import describe as machine


def round_to_10_bits(x: mx.array) -> mx.array:
    """Return float32 values with mantissas of 10 bits, rounded to nearest."""
    bits = x.view(mx.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).view(mx.float32)


def imitate_m5(monkeypatch: pytest.MonkeyPatch, variable: str = "1") -> None:
    """Describe this machine as an M5 with MLX_ENABLE_TF32 = `variable`, and let linear layers round as it does."""
    monkeypatch.setenv(machine.TF32, variable)
    monkeypatch.setattr(machine, "_mlx", lambda: machine._Found("metal", "applegpu_g17s"))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.3", ("", "", ""), "arm64"))
    if variable == "0":
        return

    def product(x: mx.array, weight: mx.array) -> mx.array:
        x, weight = round_to_10_bits(x), round_to_10_bits(weight)
        if x.shape[-2] <= 4:
            return x @ weight.T
        # A GPU picks its kernel by the number of rows, and each adds up in an order of its own.
        half = x.shape[-1] // 2
        return x[..., :half] @ weight[:, :half].T + x[..., half:] @ weight[:, half:].T

    linear, as_linear = nn.Linear.__call__, nn.Embedding.as_linear

    def rounded(self: nn.Linear, x: mx.array) -> mx.array:
        if x.shape[-2] == 1 or x.dtype != mx.float32:
            return linear(self, x)
        y = product(x, self.weight)
        return y + self.bias if "bias" in self else y

    def head(self: nn.Embedding, x: mx.array) -> mx.array:
        if x.shape[-2] == 1 or x.dtype != mx.float32:
            return as_linear(self, x)
        return product(x, self.weight)

    monkeypatch.setattr(nn.Linear, "__call__", rounded)
    monkeypatch.setattr(nn.Embedding, "as_linear", head)
