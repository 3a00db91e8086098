"""The KV cache of a decoder whose passes write more rows than they keep.

    rows     0 ............ length | length ........ length + R | ........ capacity
             committed text        | rows of the running pass   | free

A pass appends the keys and values of all its rows behind the committed text (draft nodes, then
stream rows); attention reads up to there under a mask. Once the host knows the accepted path,
`commit` moves its rows into place, as a part of the next graph, and `advance` moves the end of
the committed text. Everything behind it is scratch that the next pass overwrites: a rejected draft
or a stream is never part of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from .errors import OptionError

GROWTH = 256  # rows; mlx-lm's step, and what MLX's CUDA attention wants capacity to divide by


class LayerKV:
    """Keys and values of one layer, each (1, K, capacity, D), grown by `GROWTH` rows."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def write(self, at: int, keys: mx.array, values: mx.array) -> None:
        """Put rows (1, K, R, D) at [at, at + R), growing the buffers if needed."""
        end = at + keys.shape[2]
        if self.keys is None or self.values is None or end > self.keys.shape[2]:
            capacity = -(-end // GROWTH) * GROWTH
            self.keys = _grown(self.keys, keys, capacity)
            self.values = _grown(self.values, values, capacity)
        self.keys[..., at:end, :] = keys
        self.values[..., at:end, :] = values

    def read(self, end: int) -> tuple[mx.array, mx.array]:
        """Return the first `end` rows, two arrays (1, K, end, D)."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[..., :end, :], self.values[..., :end, :]

    def move(self, to: int, rows: mx.array) -> None:
        """Copy the rows with indices `rows` (n,) to [to, to + n)."""
        assert self.keys is not None
        assert self.values is not None
        end = to + rows.shape[0]
        self.keys[..., to:end, :] = mx.take(self.keys, rows, axis=2)
        self.values[..., to:end, :] = mx.take(self.values, rows, axis=2)


class LayerPass:
    """What a layer of mlx-lm sees as its cache during one pass: its rows go to [start, ...).

    `offset` is what the layer hands to RoPE: an int for consecutive rows, or each row's own
    position as an (R,) int32 array. `on_values` changes values before they are written.
    """

    def __init__(
        self,
        layer: LayerKV,
        start: int,
        offset: int | mx.array,
        on_values: Callable[[mx.array], mx.array] | None = None,
    ) -> None:
        self.layer = layer
        self.start = start
        self.offset = offset
        self.on_values = on_values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the pass's rows (1, K, R, D) and return all rows up to their end."""
        if self.on_values is not None:
            values = self.on_values(values)
        self.layer.write(self.start, keys, values)
        return self.layer.read(self.start + keys.shape[2])


class LayerView(Protocol):
    """What a layer of mlx-lm asks of its cache."""

    offset: int | mx.array

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]: ...


class PassCache(Protocol):
    """What a forward pass asks of a cache: a view of each layer, for its rows alone."""

    def view(
        self,
        layer: int,
        start: int,
        offset: int | mx.array,
        on_values: Callable[[mx.array], mx.array] | None = None,
    ) -> LayerView: ...


class KVCache:
    """The caches of all layers and the number of rows that are committed text."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerKV() for _ in range(num_layers)]
        self.length = 0

    def view(
        self,
        layer: int,
        start: int,
        offset: int | mx.array,
        on_values: Callable[[mx.array], mx.array] | None = None,
    ) -> LayerPass:
        """Return what layer `layer` sees as its cache during a pass; see `LayerPass`."""
        return LayerPass(self.layers[layer], start, offset, on_values)

    def commit(self, rows: Sequence[int], layers: range) -> None:
        """Bring a pass's rows, given by their places in the pass, to the end of the committed text.

        In the graph, and only those that are not in place. `layers` that hold fewer rows, because
        the tree was pruned above, get their own `rows`.
        """
        in_place = 0
        while in_place < len(rows) and rows[in_place] == in_place:
            in_place += 1
        if in_place == len(rows):
            return
        index = mx.array(list(rows[in_place:]), dtype=mx.int32) + self.length
        for layer in layers:
            self.layers[layer].move(self.length + in_place, index)

    def advance(self, rows: int) -> None:
        """Count `rows` more rows as committed."""
        self.length += rows

    def rewind(self, length: int) -> None:
        """Forget all committed rows from `length` on; the buffers are kept.

        Raises:
            OptionError: `length` is negative or beyond the committed text.
        """
        if not 0 <= length <= self.length:
            raise OptionError(
                f"cannot rewind the KV cache to {length} rows: it holds {self.length}."
            )
        self.length = length

    @property
    def arrays(self) -> list[mx.array]:
        """Return every buffer, for evaluation."""
        pairs = ((layer.keys, layer.values) for layer in self.layers)
        return [array for pair in pairs for array in pair if array is not None]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers, scratch rows included."""
        return sum(array.nbytes for array in self.arrays)

    @classmethod
    def from_mlx_lm(cls, caches: list[Any]) -> KVCache:
        """Return a cache over the rows that mlx-lm's `KVCache` objects hold.

        Raises:
            OptionError: another kind of cache, or layers of different lengths.
        """
        result = cls(len(caches))
        _check_plain(caches, len(caches))
        lengths = {int(cache.offset) for cache in caches}
        if len(lengths) != 1:
            raise OptionError(_WANTED)
        end = result.length = lengths.pop()
        for layer, cache in zip(result.layers, caches, strict=True):
            if end:
                layer.write(0, cache.keys[..., :end, :], cache.values[..., :end, :])
        return result

    def to_mlx_lm(self, caches: list[Any]) -> None:
        """Put the committed rows into mlx-lm's `KVCache` objects, which forget what they had.

        Raises:
            OptionError: another kind of cache, or another number of layers.
        """
        _check_plain(caches, len(self.layers))
        # Not through `cache.state`, whose form differs between versions of mlx-lm.
        for layer, cache in zip(self.layers, caches, strict=True):
            cache.keys, cache.values = layer.read(self.length) if self.length else (None, None)
            cache.offset = self.length


_WANTED = (
    "the prompt cache must be made of mlx-lm's plain KVCache layers of one length; "
    "make it with mlx_lm.models.cache.make_prompt_cache(model)."
)


def _check_plain(caches: list[Any], num_layers: int) -> None:
    """Raise OptionError unless these are mlx-lm's own growing caches, one per layer."""
    if len(caches) != num_layers or any(type(cache).__name__ != "KVCache" for cache in caches):
        raise OptionError(_WANTED)


def _grown(old: mx.array | None, rows: mx.array, capacity: int) -> mx.array:
    """Return a buffer of `capacity` rows that begins with those of `old`."""
    _, K, _, D = rows.shape
    have = 0 if old is None else old.shape[2]
    fresh = mx.zeros((1, K, capacity - have, D), dtype=rows.dtype)
    return fresh if old is None else mx.concatenate([old, fresh], axis=2)
