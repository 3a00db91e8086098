"""Linear layers of which every process holds a part, as mlx-lm's `shard` makes them."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)

INTO_PARTS = (AllToShardedLinear, QuantizedAllToShardedLinear)
"""From whole inputs to this process's part of the outputs (q, k, v, gate, up)."""
OUT_OF_PARTS = (ShardedToAllLinear, QuantizedShardedToAllLinear)
"""From this process's part of the inputs to whole outputs (o, down): a sum over the processes."""


def part_of(array: mx.array, axis: int, group: mx.distributed.Group) -> mx.array:
    """Return this process's part of an array that is divided evenly along `axis`."""
    return mx.contiguous(mx.split(array, group.size(), axis=axis)[group.rank()])
