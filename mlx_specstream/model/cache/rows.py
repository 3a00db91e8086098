"""One layer's keys and values in growing buffers, and what mlx-lm's layer sees during a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from ...errors import OptionError

GROWTH = 256  # rows; mlx-lm's step, and what MLX's CUDA attention wants capacity to divide by

OnValues = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Span:
    """Which committed rows a rotating layer shows to a pass, and which of them each row sees.

    As mlx-lm's `RotatingKVCache` of `size` rows does it: the first `keep` rows stay, the others
    leave in turn, so that decoding at position p sees s < keep and p − (size − keep) < s ≤ p.
    Shown are, once `length` committed rows no longer fit beside the next one,

        columns    first ........ length | rows of the pass | 0 .. keep
    """

    size: int
    keep: int
    length: int

    @property
    def wrapped(self) -> bool:
        """Tell whether some committed row is out of the next row's sight."""
        return self.length >= self.size

    @property
    def first(self) -> int:
        """Return the first row shown, apart from those that stay."""
        return self.length - (self.size - 1 - self.keep) if self.wrapped else 0

    @property
    def tail(self) -> int:
        """Return how many columns stand behind the rows of the pass."""
        return self.keep if self.wrapped else 0

    @property
    def needed(self) -> int:
        """Return the first row to hold: one more than is shown, for mlx-lm's own cache has it."""
        return self.first - 1 if self.wrapped else 0

    def columns(self, mask: mx.array) -> mx.array:
        """Return the shown columns of a mask (..., S) over all rows and those of the pass."""
        if not self.wrapped:
            return mask
        shown = mask[..., self.first :]
        return mx.concatenate([shown, mask[..., : self.keep]], axis=-1) if self.keep else shown

    def near(self, rows: mx.array, keys: mx.array) -> mx.array:
        """Return (R, S) bool: the row's position (R,) has the key's (S,) in sight, decoding."""
        sight = self.size - self.keep
        return (keys[None] > rows[:, None] - sight) | (keys[None] < self.keep)

    def near_in_chunk(self, rows: mx.array, keys: mx.array) -> mx.array:
        """Return (R, S) bool: the same for consecutive rows that mlx-lm prefills in one pass.

        There the window slides over the columns as they stand, so that the rows that stay leave
        it first; the next pass has them back.
        """
        near = keys[None] > rows[:, None] - self.size
        if not self.wrapped:
            return near
        stays = (keys[None] < self.keep) & (keys[None] >= rows[:, None] - self.length)
        return mx.where(keys[None] < self.keep, stays, near)


class LayerView(Protocol):
    """What a layer of mlx-lm asks of its cache, and the columns it gets to see."""

    offset: int | mx.array
    span: Span | None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append rows (B, K, R, D) and return all rows to attend."""
        ...


class LayerKV:
    """Keys and values of one layer, each (1, K, capacity, D), grown by `GROWTH` rows.

    new_rows: what the running pass wrote behind the committed text, if its accepted rows may have
    to be brought together. They are gathered from here, for an array that has been read by a
    gather cannot be updated in place right behind it: MLX would copy the whole buffer.
    """

    span: Span | None = None
    depends_on_passes = False

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.new_rows: tuple[mx.array, mx.array] | None = None

    def write(self, at: int, keys: mx.array, values: mx.array) -> None:
        """Put rows (1, K, R, D) at [at, at + R), growing the buffers if needed.

        Raises:
            OptionError: the buffers are of other heads or sizes, those of another model.
        """
        for held, new in ((self.keys, keys), (self.values, values)):
            if held is not None and held.shape[1::2] != new.shape[1::2]:
                raise OptionError(
                    f"the prompt cache does not fit the model: it holds rows of {held.shape[1]} heads "
                    f"and width {held.shape[3]}, the model makes {new.shape[1]} of {new.shape[3]}; "
                    "give one that this model made."
                )
        end = at + keys.shape[2]
        if self.keys is None or self.values is None or end > self.keys.shape[2]:
            capacity = -(-end // GROWTH) * GROWTH
            grown = _grown(self.keys, keys, capacity), _grown(self.values, values, capacity)
            self.keys, self.values = grown  # both or, if an interrupt falls in here, neither
        self.keys[..., at:end, :] = keys
        self.values[..., at:end, :] = values

    def read(self, end: int) -> tuple[mx.array, mx.array]:
        """Return the first `end` rows, two arrays (1, K, end, D)."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[..., :end, :], self.values[..., :end, :]

    def gather(self, to: int, rows: mx.array) -> None:
        """Copy the new rows with indices `rows` (n,), within their pass, to [to, to + n)."""
        if self.new_rows is None:
            return  # a layer without attention
        keys, values = self.new_rows
        self.write(to, mx.take(keys, rows, axis=2), mx.take(values, rows, axis=2))

    def view(
        self, start: int, offset: int | mx.array, on_values: OnValues | None = None
    ) -> LayerPass:
        """Return what mlx-lm's layer sees as its cache during a pass; see `LayerPass`."""
        return LayerPass(self, start, offset, on_values)

    def follow(self, length: int) -> None:
        """Take note that the committed text now has `length` rows; new rows are no more."""
        del length
        self.new_rows = None

    def can_rewind(self, length: int) -> bool:
        """Tell whether the layer still holds what decoding after `length` rows needs."""
        return length >= 0

    def fresh(self) -> LayerKV:
        """Return an empty layer of the same kind."""
        return LayerKV()

    def copy(self, length: int) -> LayerKV:
        """Return a layer of its own with the first `length` rows."""
        result = self.fresh()
        if length and self.keys is not None:
            result.write(0, *self.read(length))
        return result

    @property
    def arrays(self) -> list[mx.array]:
        """Return every buffer, for evaluation."""
        return [array for array in (self.keys, self.values) if array is not None]


class LayerPass:
    """What a layer of mlx-lm sees as its cache during one pass: its rows go to [start, ...).

    `offset` is what the layer hands to RoPE: an int for consecutive rows, or each row's own
    position as an (R,) int32 array. `on_values` changes values before they are written.
    `is_draft`: the rows are a draft's, of which the accepted ones may lie apart.
    """

    def __init__(
        self,
        layer: LayerKV,
        start: int,
        offset: int | mx.array,
        on_values: OnValues | None = None,
    ) -> None:
        self.layer = layer
        self.start = start
        self.offset = offset
        self.on_values = on_values
        self.span = layer.span
        self.is_draft = False

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the pass's rows (1, K, R, D) and return all rows up to their end."""
        if self.on_values is not None:
            values = self.on_values(values)
        if self.is_draft:
            self.layer.new_rows = (keys, values)
        self.layer.write(self.start, keys, values)
        return self.layer.read(self.start + keys.shape[2])


def _grown(old: mx.array | None, rows: mx.array, capacity: int) -> mx.array:
    """Return a buffer of `capacity` rows that begins with those of `old`."""
    _, K, _, D = rows.shape
    have = 0 if old is None else old.shape[2]
    fresh = mx.zeros((1, K, capacity - have, D), dtype=rows.dtype)
    return fresh if old is None else mx.concatenate([old, fresh], axis=2)
