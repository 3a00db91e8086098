"""The caches of all layers, with the moves that a decoding loop makes: commit, advance, rewind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from ...errors import OptionError
from .quantized import Quantization, QuantizedLayer
from .rows import LayerKV, LayerPass, LayerView, OnValues
from .state import StateLayer


class PassCache(Protocol):
    """What a forward pass asks of a cache: a view of each layer, for its rows alone."""

    def view(
        self,
        layer: int,
        start: int,
        offset: int | mx.array,
        on_values: OnValues | None = None,
    ) -> LayerView:
        """Return what layer `layer` sees as its cache during a pass."""
        ...


class Companion(Protocol):
    """What a drafter keeps beside a KV cache, brought in line with the committed text."""

    def follow(self, length: int) -> None:
        """Take note that the committed text now has `length` tokens."""
        ...

    def copy(self, length: int) -> Companion:
        """Return what belongs to a copy of the cache, rewound to `length` tokens."""
        ...


class KVCache:
    """The caches of all layers and the number of rows that are committed text.

    `KVCache(num_layers)` holds every row of every layer; `cache.new_cache` makes other kinds.
    With `quantize`, plain layers turn quantised for the first pass after `quantize.start` rows are
    committed, as in mlx-lm's plain decoding: between two passes, never within one.

    `next_is_generated`: the token behind the committed text was drawn by a step, which counts where rows
    depend on the passes they were computed in (`depends_on_passes`). companion: what the drafter
    that decodes with this cache keeps of the same text.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers: list[LayerKV] = [LayerKV() for _ in range(num_layers)]
        self.length = 0
        self.quantize: Quantization | None = None
        self.next_is_generated = False
        self.companion: Companion | None = None
        self._quantise_next_pass = False

    @classmethod
    def of(
        cls, layers: Sequence[LayerKV], length: int = 0, quantize: Quantization | None = None
    ) -> KVCache:
        """Return a cache of these layers, which hold `length` committed rows."""
        result = cls(0)
        result.layers, result.quantize = list(layers), quantize
        result._set_length(length)
        return result

    def view(
        self, layer: int, start: int, offset: int | mx.array, on_values: OnValues | None = None
    ) -> LayerPass:
        """Return what layer `layer` sees as its cache during a pass; see `LayerPass`."""
        self._turn(layer)
        view = self.layers[layer].view(start, offset, on_values)
        # Consecutive rows stay where they are, and streams, which begin further back, are dropped.
        view.is_draft = isinstance(offset, mx.array) and start == self.length
        return view

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
        index = mx.array(list(rows[in_place:]), dtype=mx.int32)
        for layer in layers:
            self.layers[layer].gather(self.length + in_place, index)

    def advance(self, rows: int, generated: bool = False) -> None:
        """Count `rows` more rows as committed; `generated`: this pass drew the next token."""
        self._set_length(self.length + rows)
        self.next_is_generated = generated
        self._quantise_next_pass = self.quantize is not None and self.length >= self.quantize.start

    @property
    def depends_on_passes(self) -> bool:
        """Tell whether rows differ with how a text is divided into passes, beyond rounding.

        So they do in mlx-lm's quantised caches (a pass may see its rows before they are
        quantised) and in rotating ones that keep first rows (which a chunk sees less of).
        """
        return self.quantize is not None or any(layer.depends_on_passes for layer in self.layers)

    def quantises_before(self, depth: int) -> bool:
        """Tell whether drafts down to `depth` would have to see rows quantised, the root not yet.

        Plain decoding turns the cache quantised after the pass that fills row `start` − 1; rows
        on either side of that cannot share a pass.
        """
        return (
            self.quantize is not None
            and self.length + depth >= self.quantize.start
            and not self._quantise_next_pass
            and any(type(layer) is LayerKV for layer in self.layers)
        )

    def can_rewind(self, length: int) -> bool:
        """Tell whether `rewind(length)` is possible: rotating layers forget."""
        return 0 <= length <= self.length and all(layer.can_rewind(length) for layer in self.layers)

    def cut(self, length: int) -> None:
        """Take back the last rows, drafts of a path that the answer ended inside of.

        As if they had never been accepted: the row at `length` is that of a drawn token.
        """
        assert self.can_rewind(length)
        self._set_length(length)
        self._quantise_next_pass = (
            self._quantise_next_pass and self.quantize is not None and length >= self.quantize.start
        )

    def turn_quantized(self) -> None:
        """Store rows in a few bits where mlx-lm's plain decoding would have done so by now.

        It runs the drawn token's pass, too, before it ends.
        """
        if self.quantize is not None and self.next_is_generated:
            self._quantise_next_pass = (
                self._quantise_next_pass or self.length + 1 >= self.quantize.start
            )
        for layer in range(len(self.layers)):
            self._turn(layer)

    def rewind(self, length: int) -> None:
        """Forget all committed rows from `length` on; the buffers are kept.

        Layers that have turned quantised stay so.

        Raises:
            OptionError: `length` is negative or beyond the committed text, or a rotating layer
                no longer holds the rows in sight there.
        """
        if not 0 <= length <= self.length:
            raise OptionError(
                f"cannot rewind the KV cache to {length} rows: it holds {self.length}."
            )
        if not self.can_rewind(length):
            raise OptionError(
                f"cannot rewind the KV cache from {self.length} to {length} rows: what was seen there "
                "is gone (windows move on, states are overwritten); rewind to `nearest` or begin a "
                "fresh cache, and prefill the rest again."
            )
        self.turn_quantized()
        self._set_length(length)
        self.next_is_generated = False

    def nearest(self, length: int) -> int:
        """Return the greatest length up to `length` that `rewind` reaches, 0 at least.

        Layers with a state (`StateLayer`) reach few lengths. Where a rotating layer has lost
        rows, not even 0 may be reached: `can_rewind` tells, and `fresh` begins anew.
        """
        states = [layer for layer in self.layers if isinstance(layer, StateLayer)]
        if not states:
            return length if self.can_rewind(length) else 0
        reached = (n for n in reversed(states[0].lengths) if n <= length and self.can_rewind(n))
        return next(reached, 0)

    def mark(self) -> None:
        """Hold the present length for rewinding, until another is marked."""
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.mark()

    def branch(self, node: mx.array) -> None:
        """Let streams continue from row `node` (() int32) of the last pass, where there are states."""
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.branch(node)

    def fresh(self) -> KVCache:
        """Return an empty cache of the same kind."""
        plain_first = self.quantize is not None
        layers = [
            LayerKV() if plain_first and isinstance(layer, QuantizedLayer) else layer.fresh()
            for layer in self.layers
        ]
        return KVCache.of(layers, quantize=self.quantize)

    def copy(self, length: int) -> KVCache:
        """Return a cache of its own as this one is when rewound to `length` rows.

        Raises:
            OptionError: it cannot be rewound that far.
        """
        if not self.can_rewind(length):
            raise OptionError(
                f"cannot copy {length} rows of the KV cache: of {self.length}, older ones are gone."
            )
        layers = [layer.copy(length) for layer in self.layers]
        result = KVCache.of(layers, length, self.quantize)
        if length == self.length:
            result.next_is_generated, result._quantise_next_pass = (
                self.next_is_generated,
                self._quantise_next_pass,
            )
        if self.companion is not None:
            result.companion = self.companion.copy(length)
        return result

    @property
    def arrays(self) -> list[mx.array]:
        """Return every buffer, for evaluation."""
        return [array for layer in self.layers for array in layer.arrays]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers, scratch rows included."""
        return sum(array.nbytes for array in self.arrays)

    def bytes_of(self, layers: range) -> int:
        """Return the bytes of these layers' keys and values, scratch rows included."""
        held = (self.layers[index] for index in layers)
        rows = (layer.arrays for layer in held if not isinstance(layer, StateLayer))
        return sum(array.nbytes for arrays in rows for array in arrays)

    def _set_length(self, length: int) -> None:
        self.length = length
        for layer in self.layers:
            layer.follow(length)
        if self.companion is not None:
            self.companion.follow(length)

    def _turn(self, index: int) -> None:
        """Store a plain layer's rows in a few bits if that is due, as a part of the next graph."""
        layer, how = self.layers[index], self.quantize
        if self._quantise_next_pass and how is not None and type(layer) is LayerKV:
            self.layers[index] = QuantizedLayer.of(layer, how.bits, how.group_size)
