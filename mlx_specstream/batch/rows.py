"""Where the rows of a batched pass stand, and whom each of them sees.

A row sees its sequence's columns up to the main row it belongs to and, of the streams, those of
its own node up to itself: two spans of columns, a prefix and a range. In a chain the main row of
node t stands at column and position length + t, so the prefix is all it needs. One sequence of
length 3 with two nodes (root A, draft B) and γ = 2, streams in the same pass:

    column     0 1 2   3 4   5  6  7  8
               text    A B   A1 A2 B1 B2
    A          1 1 1   1 .   s  s  .  .      s: shared mode only [SS Eq. 1]
    B          1 1 1   1 1   .  .  s  s
    A1         1 1 1   1 .   1  .  .  .
    A2         1 1 1   1 .   1  1  .  .
    B1         1 1 1   1 1   .  .  1  .
    B2         1 1 1   1 1   .  .  1  1
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..model.masks import RowMask
from ..speculation.streams import Streams
from .cache import BatchKVCache, BatchPass


@dataclass(frozen=True)
class BatchRows:
    """The rows of one pass: where they go, their RoPE positions (B, R) and their masks."""

    cache: BatchPass
    positions: mx.array
    mask: RowMask


def main_rows(cache: BatchKVCache, num_nodes: int) -> BatchRows:
    """Return the rows of the main stream alone: `num_nodes` behind each sequence's text."""
    at = _lengths(cache) + mx.arange(num_nodes, dtype=mx.int32)
    return _rows(cache, at, at, num_nodes, num_nodes, prefix=at)


def inline_rows(cache: BatchKVCache, num_nodes: int, streams: Streams) -> BatchRows:
    """Return main rows, then every node's streams, node by node."""
    T, G = num_nodes, streams.num_streams
    main = _lengths(cache) + mx.arange(T, dtype=mx.int32)
    first = main[:, :1] + T  # where the streams begin
    stream = first + mx.arange(T * G, dtype=mx.int32)
    of_node = first + G * mx.arange(T, dtype=mx.int32)  # where each node's begin
    columns = mx.concatenate([main, stream], axis=1)
    # Lossless main rows see no streams: an empty range, its end before its beginning.
    main_end = of_node + (G - 1) if streams.shared else of_node - 1
    own = (
        mx.concatenate([of_node, mx.repeat(of_node, G, axis=1)], axis=1),
        mx.concatenate([main_end, stream], axis=1),
    )
    return _rows(
        cache,
        columns,
        mx.concatenate([main, streams.positions(main)], axis=1),
        num_main=T,
        width=T * (1 + G),
        prefix=mx.concatenate([main, mx.repeat(main, G, axis=1)], axis=1),
        own=own,
    )


def deferred_rows(
    cache: BatchKVCache, num_nodes: int, streams: Streams, accepted: mx.array
) -> BatchRows:
    """Return the streams of one node per sequence, `accepted` (B,), behind the main rows."""
    lengths = _lengths(cache)
    first = lengths + num_nodes
    columns = first + mx.arange(streams.num_streams, dtype=mx.int32)
    node = lengths + accepted[:, None]
    return _rows(
        cache,
        columns,
        streams.positions(node),
        num_main=0,
        width=num_nodes + streams.num_streams,
        prefix=mx.broadcast_to(node, columns.shape),
        own=(mx.broadcast_to(first, columns.shape), columns),
    )


def _rows(
    cache: BatchKVCache,
    columns: mx.array,
    positions: mx.array,
    num_main: int,
    width: int,
    prefix: mx.array,
    own: tuple[mx.array, mx.array] | None = None,
) -> BatchRows:
    """Return rows that see columns ≤ `prefix` and those in `own` (first, last), all (B, R).

    width: columns in use behind each sequence's text at the end of the pass.
    """
    end = max(cache.lengths) + width
    every = mx.arange(end, dtype=mx.int32)
    seen = every <= prefix[..., None]
    to_streams = None
    if own is not None:
        to_streams = (every >= own[0][..., None]) & (every <= own[1][..., None])
        seen = seen | to_streams
        to_streams = to_streams & (mx.arange(columns.shape[1])[:, None] < num_main)

    def at() -> tuple[mx.array, mx.array]:
        # Of a pass with streams, their columns' positions are their own.
        keys = mx.broadcast_to(every, (cache.size, end))
        keys = mx.put_along_axis(keys, columns, positions, axis=1)
        return positions[:, None], keys[:, None]

    own_streams = None if to_streams is None else to_streams[:, None]
    mask = RowMask(seen[:, None], at, own_streams)
    return BatchRows(BatchPass(cache, columns, num_main, end), positions, mask)


def _lengths(cache: BatchKVCache) -> mx.array:
    """Return the sequences' lengths (B, 1) int32."""
    return mx.array(cache.lengths, dtype=mx.int32)[:, None]
