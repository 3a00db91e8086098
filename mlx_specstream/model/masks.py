"""Who sees whom in one pass: one boolean array for all layers, and another per sliding window.

    committed text, 9 tokens | rows: a chain of 3
    1 1 1 1 1 1 1 1 1        | 1 1 0      its second row, at position 10, sees this
    0 0 0 0 0 0 0 1 1        | 1 1 0      and this in a layer with a window of 4

Masks are made when a layer first asks for them and shared by the layers after it.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .cache import Span

Mask = mx.array | str | None


class RowMask:
    """The masks of one pass: who sees whom, and per sliding window who is near enough.

    seen: (R, S) bool, "causal" or None (all); (B, 1, R, S) in a batch. positions: the rows' (R,)
    and the keys' (S,) int32, needed only where a layer has a window; in a batch (B, 1, R) and
    (B, 1, S). own_streams: as `seen`, which of the keys are streams (shared mode with gates);
    None for the last columns.
    """

    def __init__(
        self,
        seen: Mask,
        positions: Callable[[], tuple[mx.array, mx.array]],
        own_streams: mx.array | None = None,
    ) -> None:
        self.seen = seen
        self.positions = positions
        self.own_streams = own_streams
        self._windowed: dict[int, Mask] = {}
        self._rotating: dict[Span, Mask] = {}

    def of(self, window: int | None, span: Span | None = None) -> Mask:
        """Return the mask of a layer with this sliding window (None: it sees everything).

        With a `span`, over the columns that a rotating cache shows; if the layer has a window
        as well, it is the cache's size.
        """
        if span is not None:
            if span not in self._rotating:
                self._rotating[span] = self._in_sight(span)
            return self._rotating[span]
        if window is None:
            return self.seen
        if window not in self._windowed:
            rows, keys = self.positions()
            near = keys[..., None, :] > rows[..., None] - window
            seen = self.as_array()
            self._windowed[window] = near if seen is None else near & seen
        return self._windowed[window]

    def as_array(self) -> mx.array | None:
        """Return who sees whom as an array, (R, S) or (B, 1, R, S) bool, or None (all)."""
        if isinstance(self.seen, str):
            rows, keys = self.positions()
            return keys[..., None, :] <= rows[..., None]
        return self.seen

    def _in_sight(self, span: Span) -> Mask:
        """Return who sees whom where rows leave the cache in turn."""
        if self.seen is None:
            return None  # one row, and the span shows what it sees
        rows, keys = self.positions()
        if not isinstance(self.seen, str):
            return span.columns(self.seen & span.near(rows, keys))
        if keys.shape[0] <= span.size:
            return self.seen
        return span.columns(span.near_in_chunk(rows, keys) & (keys[None] <= rows[:, None]))


def causal_mask(length: int, rows: int) -> RowMask:
    """Return the masks for `rows` consecutive tokens after `length` committed ones."""

    def positions() -> tuple[mx.array, mx.array]:
        keys = mx.arange(length + rows, dtype=mx.int32)
        return keys[length:], keys

    return RowMask(None if rows == 1 else "causal", positions)


def among_streams(num_nodes: int, num_streams: int) -> mx.array:
    """Return who sees whom among the streams of nodes, node by node, (n·γ, n·γ) bool [SS Eq. 2].

    Stream j sees streams 1..j of its own node; of two nodes with two streams each:

        1 0 0 0
        1 1 0 0
        0 0 1 0
        0 0 1 1
    """
    earlier = mx.tril(mx.ones((num_streams, num_streams), dtype=mx.bool_))
    return mx.kron(mx.eye(num_nodes, dtype=mx.bool_), earlier)
