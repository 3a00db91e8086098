"""Layers whose rows are stored in a few bits, as mlx-lm's `QuantizedKVCache` stores them.

A row is quantised when it is written and attended as it is stored, by mlx-lm's own quantised
attention: the rows of the running pass too, so that a draft sees itself and its ancestors as
plain decoding would have left them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .rows import LayerKV, LayerPass, OnValues


@dataclass(frozen=True)
class Quantization:
    """How rows are stored from `start` committed rows on: `bits` each, a scale per `group_size`."""

    bits: int
    group_size: int
    start: int = 0


class QuantizedLayer(LayerKV):
    """Rows as codes, scales and biases, a buffer of keys and one of values for each."""

    depends_on_passes = True

    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.parts = (LayerKV(), LayerKV(), LayerKV())

    def write(self, at: int, keys: mx.array, values: mx.array) -> None:
        """Quantise rows (1, K, R, D) and put them at [at, at + R)."""
        self.write_packed(at, self.packed(keys), self.packed(values))

    def write_packed(
        self, at: int, keys: tuple[mx.array, ...], values: tuple[mx.array, ...]
    ) -> None:
        """Put quantised rows, each (codes, scales, biases), at [at, at + R)."""
        for part, part_keys, part_values in zip(self.parts, keys, values, strict=True):
            part.write(at, part_keys, part_values)

    def read_packed(self, end: int) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        """Return the first `end` rows' keys and values, each (codes, scales, biases)."""
        pairs = [part.read(end) for part in self.parts]
        return tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs)

    def read(self, end: int) -> tuple[mx.array, mx.array]:
        """Return what the first `end` rows stand for, two arrays (1, K, end, D)."""
        keys, values = self.read_packed(end)
        return self._unpacked(keys), self._unpacked(values)

    def follow(self, length: int) -> None:
        """Take note that the committed text now has `length` rows; new rows are no more."""
        for part in self.parts:
            part.follow(length)

    def gather(self, to: int, rows: mx.array) -> None:
        """Copy the new rows with indices `rows` (n,), within their pass, to [to, to + n)."""
        for part in self.parts:
            part.gather(to, rows)

    def view(
        self, start: int, offset: int | mx.array, on_values: OnValues | None = None
    ) -> QuantizedPass:
        """Return what mlx-lm's layer sees as its cache during a pass."""
        return QuantizedPass(self, start, offset, on_values)

    def fresh(self) -> QuantizedLayer:
        """Return an empty layer of the same kind."""
        return QuantizedLayer(self.bits, self.group_size)

    def copy(self, length: int) -> QuantizedLayer:
        """Return a layer of its own with the first `length` rows."""
        result = self.fresh()
        if length:
            result.write_packed(0, *self.read_packed(length))
        return result

    @property
    def arrays(self) -> list[mx.array]:
        """Return every buffer, for evaluation."""
        return [array for part in self.parts for array in part.arrays]

    @classmethod
    def of(cls, layer: LayerKV, bits: int, group_size: int) -> QuantizedLayer:
        """Return a layer with the rows of a plain one, its scratch rows included."""
        result = cls(bits, group_size)
        if layer.keys is not None and layer.values is not None:
            result.write(0, layer.keys, layer.values)
        return result

    def packed(self, rows: mx.array) -> tuple[mx.array, ...]:
        """Return rows (1, K, R, D) quantised: codes, scales, biases."""
        return tuple(mx.quantize(rows, group_size=self.group_size, bits=self.bits))

    def _unpacked(self, rows: tuple[mx.array, ...]) -> mx.array:
        codes, scales, biases = rows
        return mx.dequantize(codes, scales, biases, group_size=self.group_size, bits=self.bits)


class QuantizedPass(LayerPass):
    """What a layer sees of a `QuantizedLayer`: mlx-lm's attention goes by `bits`."""

    layer: QuantizedLayer

    def __init__(
        self,
        layer: QuantizedLayer,
        start: int,
        offset: int | mx.array,
        on_values: OnValues | None = None,
    ) -> None:
        super().__init__(layer, start, offset, on_values)
        self.bits, self.group_size = layer.bits, layer.group_size
        self.num_heads = 0
        """Heads to return keys and values for, each as often as needed; 0: as many as there are.

        mlx-lm's quantised attention takes a mask per query head only where each has its own keys.
        """

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append the pass's rows (1, K, R, D) and return all rows, quantised."""
        if self.on_values is not None:
            values = self.on_values(values)
        new = self.layer.packed(keys), self.layer.packed(values)
        if self.is_draft:
            for part, *rows in zip(self.layer.parts, *new, strict=True):
                part.new_rows = (rows[0], rows[1])
        self.layer.write_packed(self.start, *new)
        packed = self.layer.read_packed(self.start + keys.shape[2])
        times = self.num_heads // keys.shape[1]
        if times <= 1:
            return packed
        return tuple(tuple(mx.repeat(part, times, axis=1) for part in parts) for parts in packed)
