"""Attention in pieces that MLX's fused kernels on Metal take.

There are two: one for up to 8 rows, if rows x query heads per key head are at most 32, and one for
more rows, which has no room for large heads. What neither takes is computed step by step, scores in
memory, which is slow in long contexts. So five rows of a model with 7 query heads per key head (4
go at once) are attended as 3 and 2: every row sees the same keys in any piece.

mlx-lm's layers find their attention function among the globals of their own module; a view of a
layer gets a `__call__` that finds `attend` there. The user's model and mlx-lm stay untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from .families.replace import override_methods

FEW_ROWS = 8
"""Rows up to which MLX on Metal uses its attention for short queries, if it takes them at all."""
MOST_ROWS = 32  # of a pass in pieces: more than a tree has; a prompt's chunks stay whole
# Channels of queries and keys, and of values. 512 is left out: it is fused for one row alone.
_BOTH = {(64, 64), (96, 96), (128, 128), (96, 64)}
_FEW_ROWS_DIMS = _BOTH | {(256, 256), (192, 128)}
_MANY_ROWS_DIMS = _BOTH | {(72, 72), (80, 80)}
_NAME = "scaled_dot_product_attention"
_attention = base.scaled_dot_product_attention


@dataclass(frozen=True)
class FusedAttention:
    """Which passes MLX's fused attention on Metal takes, for a model with such heads.

    head_dim: channels of queries and keys. value_dim: of values, 0 for as many.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int = 0

    @property
    def group(self) -> int:
        """Return how many query heads there are per key head."""
        return max(1, self.num_heads // max(1, self.num_kv_heads))

    def takes(self, rows: int) -> bool:
        """Tell whether a pass of `rows` rows is fused."""
        dims = self.head_dim, self.value_dim or self.head_dim
        if rows > FEW_ROWS:
            return dims in _MANY_ROWS_DIMS
        return dims in _FEW_ROWS_DIMS and rows * self.group <= 32

    def loses(self, rows: int) -> bool:
        """Tell whether a pass falls off the fused attention that plain decoding is on."""
        return self.takes(1) and not self.takes(rows)

    def pieces(self, rows: int) -> list[int]:
        """Return how many rows to attend at once, call by call."""
        if rows > MOST_ROWS or not self.loses(rows):
            return [rows]
        calls = -(-rows // min(FEW_ROWS, 32 // self.group))
        return [rows // calls + (call < rows % calls) for call in range(calls)]


def attend(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Do what mlx-lm's function of that name does, on Metal in pieces that its kernels take.

    queries: (B, H, R, D). keys, values: (B, K, S, D), or tuples in a few bits. mask: (..., R, S).
    """

    def part(first: int, end: int) -> mx.array:
        rows, k, v, own = queries, keys, values, mask
        if end - first < R:
            rows = queries[:, :, first:end]
            if isinstance(mask, mx.array) and mask.shape[-2] == R:
                own = mask[..., first:end, :]
            elif isinstance(mask, str):  # causal: the last row of a piece sees its last key
                seen = keys.shape[2] - R + end
                k, v = keys[:, :, :seen], values[:, :, :seen]
        found = _attention(rows, k, v, cache=cache, scale=scale, mask=own, sinks=sinks)
        return cast(mx.array, found)

    R = queries.shape[2]
    if R == 1 or not isinstance(keys, mx.array) or not on_metal():
        return part(0, R)
    heads = FusedAttention(queries.shape[1], keys.shape[1], queries.shape[3], values.shape[3])
    parts, first = [], 0
    for rows in heads.pieces(R):
        parts.append(part(first, first + rows))
        first += rows
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def on_metal() -> bool:
    """Tell whether MLX computes on a Mac's GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def in_pieces(module: nn.Module) -> nn.Module:
    """Return `module`, or a copy that attends in pieces if its own code calls mlx-lm's attention."""
    call = type(module).__dict__.get("__call__")
    if not isinstance(call, FunctionType) or _NAME not in call.__code__.co_names:
        return module
    if call.__globals__.get(_NAME) is not base.scaled_dot_product_attention:
        return module
    return cast(nn.Module, override_methods(module, __call__=_with_attend(call)))


@cache
def _with_attend(call: FunctionType) -> FunctionType:
    names = {**call.__globals__, _NAME: attend}
    own = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    own.__kwdefaults__ = call.__kwdefaults__
    return own
