"""Stream adapters on layers of which every process holds a part (mlx-lm's `shard`).

A projection into parts (q, k, v, gate, up) needs the columns of B that belong to its outputs. One
out of parts (o, down) has the rows of A that belong to its inputs, and its sum over the processes
comes after the adapter, so that streams cost no message of their own:

    y = sum over processes of (W_r x_r + B A_r x_r)
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class LocalLinear(nn.Module):
    """The product of a `ShardedToAll` layer with this process's inputs, before the sum."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __call__(self, x: mx.array) -> mx.array:
        base = self.base
        if "scales" not in base:
            return x @ base.weight.T
        return mx.quantized_matmul(
            x,
            base.weight,
            scales=base.scales,
            biases=base.get("biases"),
            transpose=True,
            group_size=base.group_size,
            bits=base.bits,
            mode=base.mode,
        )


class Summed(nn.Module):
    """The sum over all processes of what `local` computes, plus the layer's bias."""

    def __init__(self, local: nn.Module, base: nn.Module) -> None:
        super().__init__()
        self.local = local
        self.base = base

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(self.local(x), group=self.base.group)
        return y + self.base.bias if "bias" in self.base else y
