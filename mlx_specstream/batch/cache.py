"""The KV cache of several sequences side by side, each with a length of its own.

    sequence 0   a a a a a a a a | d d d d d |          a, b, c  committed text
    sequence 1   b b b | d d d d d | . . . . .          d        rows of the running pass
    sequence 2   c c c c c | d d d d d | . . .          .        masked: older scratch, or zeros

A sequence's text begins at column 0 and a pass's rows go right behind it, so the accepted part of
a chain is already in place when its length is known: nothing is ever moved to commit it, and
nothing is padded on the left when a longer sequence joins.

Masked columns take part in attention with weight 0, and 0 · NaN is NaN: so a row that a sequence
takes over is overwritten to its end, and stream rows, which may overflow without harm, are kept
finite. What one sequence computes never reaches another.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import OptionError
from ..model.cache import GROWTH, KVCache, LayerKV, OnValues, Span


class BatchLayerKV:
    """Keys and values of one layer, each (slots, K, capacity, D); made by the first write."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def resize(self, slots: int, capacity: int) -> None:
        """Copy what fits into buffers of another size, zeros around it; none without slots."""
        if self.keys is not None and self.values is not None:
            self.keys = _resized(self.keys, slots, capacity) if slots else None
            self.values = _resized(self.values, slots, capacity) if slots else None

    def ensure(self, slots: int, capacity: int, keys: mx.array, values: mx.array) -> None:
        """Make the buffers for rows (·, K, ·, D) such as these, if there are none."""
        if self.keys is None:
            self.keys = _zeros(slots, capacity, keys)
            self.values = _zeros(slots, capacity, values)

    def write(self, columns: mx.array, keys: mx.array, values: mx.array) -> None:
        """Put rows (B, K, R, D) of the first B sequences at `columns` (slots, 1, R, 1) int32."""
        assert self.keys is not None
        assert self.values is not None
        if idle := columns.shape[0] - keys.shape[0]:
            keys, values = (mx.pad(x, [(0, idle), (0, 0), (0, 0), (0, 0)]) for x in (keys, values))
        self.keys = mx.put_along_axis(self.keys, columns, keys, axis=2)
        self.values = mx.put_along_axis(self.values, columns, values, axis=2)

    def read(self, sequences: int, end: int) -> tuple[mx.array, mx.array]:
        """Return the first `end` columns of the first sequences, two arrays (B, K, end, D)."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:sequences, :, :end], self.values[:sequences, :, :end]

    def replace(self, row: int, keys: mx.array, values: mx.array) -> None:
        """Overwrite a sequence's whole row: (1, K, n, D), then zeros."""
        assert self.keys is not None
        assert self.values is not None
        rest = self.keys.shape[2] - keys.shape[2]
        padding = [(0, 0), (0, 0), (0, rest), (0, 0)]
        self.keys[row : row + 1] = mx.pad(keys, padding)
        self.values[row : row + 1] = mx.pad(values, padding)

    def row(self, row: int, end: int) -> tuple[mx.array, mx.array]:
        """Return copies of one sequence's first `end` columns, (1, K, end, D) each.

        Copies, not views: a view would keep the next pass from updating the buffers in place.
        """
        assert self.keys is not None
        assert self.values is not None
        views = (x[row : row + 1, :, :end] for x in (self.keys, self.values))
        keys, values = (mx.contiguous(view) for view in views)
        return keys, values


class BatchKVCache:
    """The caches of all layers for B sequences; `lengths` holds their committed columns."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [BatchLayerKV() for _ in range(num_layers)]
        self.lengths: list[int] = []
        self.slots = 0
        self.capacity = 0

    @property
    def size(self) -> int:
        """Return B, how many sequences there are."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        return self.bytes_of(range(len(self.layers)))

    def bytes_of(self, layers: range) -> int:
        """Return the bytes of these layers' buffers."""
        held = (self.layers[index] for index in layers)
        pairs = ((layer.keys, layer.values) for layer in held)
        return sum(buffer.nbytes for pair in pairs for buffer in pair if buffer is not None)

    def reserve(self, scratch: int) -> None:
        """Make room for `scratch` columns behind every sequence; give back what is far too much."""
        self._fit(self.size, max(self.lengths, default=0) + scratch)

    def join(self, cache: KVCache) -> None:
        """Add a sequence with the committed rows of `cache`, a plain one, as the last one."""
        self._fit(self.size + 1, max([*self.lengths, cache.length]))
        for layer, own in zip(self.layers, cache.layers, strict=True):
            if own.keys is not None and cache.length:
                keys, values = own.read(cache.length)
                layer.ensure(self.slots, self.capacity, keys, values)
                layer.replace(self.size, keys, values)
            elif layer.keys is not None and layer.values is not None:
                layer.replace(self.size, layer.keys[:1, :, :0], layer.values[:1, :, :0])
        self.lengths.append(cache.length)

    def leave(self, row: int) -> KVCache:
        """Take out a sequence, with its committed rows as a cache of its own.

        The last sequence takes its row: `lengths[row] = lengths.pop()`.
        """
        result, last = KVCache(len(self.layers)), self.size - 1
        length = self.lengths[row]
        for layer, own in zip(self.layers, result.layers, strict=True):
            if length and layer.keys is not None:  # a layer without attention has none
                own.write(0, *layer.row(row, length))
        result.advance(length)
        mx.async_eval(result.arrays)
        if row != last:
            # With the rows of a pass under way, which may turn out to be committed.
            for layer in self.layers:
                if layer.keys is not None:
                    layer.replace(row, *layer.row(last, self.capacity))
        end = self.lengths.pop()
        if row != last:
            self.lengths[row] = end
        return result

    def _fit(self, slots: int, columns: int) -> None:
        """Bring the buffers to a size that holds this much and is at most twice as large."""
        capacity = -(-columns // GROWTH) * GROWTH
        if slots <= self.slots <= 2 * slots:
            slots = self.slots
        if capacity <= self.capacity <= 2 * capacity:
            capacity = self.capacity
        if (slots, capacity) != (self.slots, self.capacity):
            for layer in self.layers:
                layer.resize(slots, capacity)
            self.slots, self.capacity = slots, capacity


class BatchPass:
    """What the layers see as their cache during one pass over a batch.

    columns: (B, R) int32, where each sequence's rows go; the first `num_main` rows are the main
    stream's, the others streams. end: columns that attention reads.
    """

    def __init__(self, cache: BatchKVCache, columns: mx.array, num_main: int, end: int) -> None:
        assert end <= cache.capacity
        self.cache = cache
        self.num_main = num_main
        self.end = end
        if idle := cache.slots - cache.size:
            columns = mx.pad(columns, [(0, idle), (0, 0)])
        self.columns = columns[:, None, :, None]

    def view(
        self,
        layer: int,
        start: int,
        offset: int | mx.array,
        on_values: OnValues | None = None,
    ) -> BatchView:
        """Return what layer `layer` sees as its cache; `columns` say what `start` says elsewhere."""
        del start
        return BatchView(self, self.cache.layers[layer], offset, on_values)


class BatchView:
    """One layer's cache during one pass; `offset` is what the layer hands to RoPE, (B, R)."""

    span: Span | None = None  # sliding windows are the masks' business

    def __init__(
        self,
        running: BatchPass,
        layer: BatchLayerKV,
        offset: int | mx.array,
        on_values: OnValues | None,
    ) -> None:
        self.running = running
        self.layer = layer
        self.offset = offset
        self.on_values = on_values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the pass's rows (B, K, R, D) and return all columns up to its end."""
        running, cache = self.running, self.running.cache
        if self.on_values is not None:
            values = self.on_values(values)
        if running.num_main < keys.shape[2]:
            keys, values = (_finite_from(running.num_main, x) for x in (keys, values))
        self.layer.ensure(cache.slots, cache.capacity, keys, values)
        self.layer.write(running.columns, keys, values)
        return self.layer.read(cache.size, running.end)


def check_cache(cache: KVCache, num_layers: int) -> None:
    """Refuse a cache that cannot join a batch.

    Raises:
        OptionError: it has another number of layers than the model, or not plain growing ones.
    """
    if len(cache.layers) != num_layers:
        raise OptionError(
            f"the prompt cache has {len(cache.layers)} layers and the model {num_layers}; "
            "make it for this model."
        )
    if cache.quantize is not None or any(type(layer) is not LayerKV for layer in cache.layers):
        raise OptionError(
            "requests are batched with plain growing caches, and this one rotates or is quantised; "
            "take one from BatchDecoder.new_cache, or decode its request alone."
        )


def _finite_from(row: int, x: mx.array) -> mx.array:
    """Return (B, K, R, D) with 0 for what is not finite in the rows from `row` on."""
    finite = mx.where(mx.isfinite(x[:, :, row:]), x[:, :, row:], mx.zeros((), dtype=x.dtype))
    return finite if row == 0 else mx.concatenate([x[:, :, :row], finite], axis=2)


def _zeros(slots: int, capacity: int, like: mx.array) -> mx.array:
    _, K, _, D = like.shape
    return mx.zeros((slots, K, capacity, D), dtype=like.dtype)


def _resized(old: mx.array, slots: int, capacity: int) -> mx.array:
    have, columns = min(slots, old.shape[0]), min(capacity, old.shape[2])
    fresh = _zeros(slots, capacity, old)
    fresh[:have, :, :columns] = old[:have, :, :columns]
    return fresh
