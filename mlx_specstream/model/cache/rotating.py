"""Layers that see a window of recent rows, and perhaps the first ones: sliding windows, max_kv_size.

    buffer    dropped ...... first ........ length | rows of the pass | kept rows | free
              out of sight   in sight              | scratch                      |
              └──────────── what a pass attends is one slice ─────────┘

Rows that fell out of sight stay for a while: a path that is cut short, or a text that is
rewound a little, brings them back into sight. They are dropped many at a time, so that
the copy this takes is a small part of what attention reads meanwhile. Draft rows lie behind the
committed ones and overwrite nothing, also after the window has moved on; a draft further down
the tree sees less of the oldest rows, which is the mask's business (`Span`).

The rows that stay (`keep`) are copied behind the pass's own: columns may stand in any order, and
so all that is attended is contiguous, without rows that a mask would have to hide.
"""

from __future__ import annotations

import mlx.core as mx

from .rows import GROWTH, LayerKV, LayerPass, OnValues, Span

SLACK = 64  # rows out of sight that are always left; more than the drafts of any path


class RotatingLayer(LayerKV):
    """Holds the last rows of a text, and its first `keep`.

    `dropped` rows of the text (those that stay apart) are no longer in the buffers, whose first
    row is row number `dropped`. Rows are always addressed by their number in the text. At least
    `slack` rows out of sight are left, so that as many may be taken back, and no more than `drop`
    beyond that.
    """

    span: Span

    def __init__(self, size: int, keep: int = 0, slack: int = SLACK, drop: int = GROWTH) -> None:
        assert 0 <= keep < size
        super().__init__()
        self.size, self.keep, self.slack, self.drop = size, keep, slack, drop
        self.depends_on_passes = keep > 0
        self.dropped = 0
        self.kept: tuple[mx.array, mx.array] | None = None
        self.span = Span(size, keep, 0)

    def write(self, at: int, keys: mx.array, values: mx.array) -> None:
        """Put rows (1, K, R, D) at [at, at + R) of the text."""
        super().write(at - self.dropped, keys, values)

    def read(self, end: int) -> tuple[mx.array, mx.array]:
        """Return all rows in sight of the next one, up to `end`, the ones that stay first."""
        keys, values = self.between(self.span.first, end)
        if self.span.tail and self.kept is not None:
            keys = mx.concatenate([self.kept[0], keys], axis=2)
            values = mx.concatenate([self.kept[1], values], axis=2)
        return keys, values

    def between(self, first: int, end: int) -> tuple[mx.array, mx.array]:
        """Return the rows [first, end) of the text."""
        assert first >= self.dropped
        keys, values = super().read(end - self.dropped)
        return keys[..., first - self.dropped :, :], values[..., first - self.dropped :, :]

    def view(
        self, start: int, offset: int | mx.array, on_values: OnValues | None = None
    ) -> RotatingPass:
        """Return what mlx-lm's layer sees as its cache during a pass."""
        return RotatingPass(self, start, offset, on_values)

    def follow(self, length: int) -> None:
        """Note the text's new length; drop rows that are long out of sight."""
        super().follow(length)
        self.span = Span(self.size, self.keep, length)
        # What `slack` rows fewer need: where the window first moves, it lets go of `keep` more.
        first = Span(self.size, self.keep, max(length - self.slack, 0)).needed
        if self.keys is None or self.values is None:
            # Another process may hold this layer's rows, and decides alike.
            if first - self.dropped > self.drop:
                self.dropped = first
            return
        if not self.span.wrapped:
            self.kept = None  # they are in the buffers, and may be rewound
        elif self.keep and self.kept is None:
            # Taken, not sliced: a slice would hold on to the buffer and keep MLX from updating
            # it in place.
            stay = mx.arange(self.keep)
            self.kept = (mx.take(self.keys, stay, axis=2), mx.take(self.values, stay, axis=2))
        if first - self.dropped > self.drop:
            self._drop(first, length)

    def _drop(self, first: int, length: int) -> None:
        """Keep the rows [first, length) alone, in new buffers."""
        keys, values = self.between(first, length)
        rows = length - first
        # Room for what comes until the next drop, and for the rows of a pass.
        capacity = -(-(rows + self.drop + SLACK) // GROWTH) * GROWTH
        padded = _padded(keys, capacity), _padded(values, capacity)
        # All or, if an interrupt falls in here, nothing.
        self.keys, self.values, self.dropped = *padded, first

    def can_rewind(self, length: int) -> bool:
        """Tell whether all rows in sight after `length` are still there."""
        return length >= 0 and Span(self.size, self.keep, length).needed >= self.dropped

    def fresh(self) -> RotatingLayer:
        """Return an empty layer of the same kind."""
        return RotatingLayer(self.size, self.keep, self.slack, self.drop)

    def copy(self, length: int) -> RotatingLayer:
        """Return a layer of its own as this one is after `length` rows, if it can be rewound."""
        result = self.fresh()
        result.dropped = max(self.dropped, Span(self.size, self.keep, length).needed)
        if length and self.keys is not None:  # a layer without attention has none
            result.write(result.dropped, *self.between(result.dropped, length))
            if self.kept is not None and Span(self.size, self.keep, length).wrapped:
                result.kept = self.kept
        result.follow(length)
        return result

    @property
    def arrays(self) -> list[mx.array]:
        """Return every buffer, for evaluation."""
        return [*super().arrays, *(self.kept or ())]


class RotatingPass(LayerPass):
    """What a layer sees of a `RotatingLayer` during one pass: the columns of its `Span`."""

    layer: RotatingLayer
    span: Span

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the pass's rows (1, K, R, D) and return all rows in sight of one of them."""
        if self.on_values is not None:
            values = self.on_values(values)
        if self.is_draft:
            self.layer.new_rows = (keys, values)
        if self.span.tail and self.layer.kept is not None:
            keys = mx.concatenate([keys, self.layer.kept[0]], axis=2)
            values = mx.concatenate([values, self.layer.kept[1]], axis=2)
        self.layer.write(self.start, keys, values)
        return self.layer.between(self.span.first, self.start + keys.shape[2])


def _padded(rows: mx.array, capacity: int) -> mx.array:
    """Return rows (1, K, n, D) with free ones behind them, `capacity` in all."""
    _, K, n, D = rows.shape
    return mx.concatenate([rows, mx.zeros((1, K, capacity - n, D), dtype=rows.dtype)], axis=2)
