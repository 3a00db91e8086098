"""What a model computes before its layers and behind them, done by its own code.

    tokens ──► embed ──► layers ... ──► norm ──► product with the head's weights ──► finish
               scales                   multipliers                       scales, soft-caps, biases

The model's own forward runs with stand-ins: its first layer takes the hidden state and stops
there, its layers hand a given hidden state on, its head takes its input or gives a given product.
Where nothing stands between two parts, the part itself is called and the forward is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ...errors import ModelError
from .calls import Key, Kind, LayerCall, by_key
from .record import SECOND, Called, Pass, Recording
from .replace import override_methods, replace_modules

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
LINEARS = (nn.Linear, nn.QuantizedLinear)


class _ReachedError(Exception):
    """Carries what a stand-in was called with out of the model's forward."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_given, self.kwargs_given = args, kwargs


class _Running(threading.local):
    """What one thread's call of the model's forward is to pass on; threads may decode at once.

    last_extras: the newest rows, their positions, and what layers were handed for them.
    """

    hidden: mx.array | None = None
    product: mx.array | None = None
    last_extras: tuple[int, object, dict[Key, mx.array]] | None = None


class _Positions:
    """A cache that knows nothing but where rows are."""

    def __init__(self, offset: int | mx.array) -> None:
        self.offset = offset

    def make_mask(self, *_: Any, **__: Any) -> None:
        return None


class EmbedAndHead:
    """A model without its layers.

    embedding: the module that holds the token embeddings. head: the one that holds the head's
    weights, the same where they are tied.

    Raises:
        ModelError: a part cannot be found.
    """

    def __init__(self, recording: Recording, calls: list[LayerCall]) -> None:
        model, seen = recording.model, recording.passes[1]
        embedded = _embedding_call(seen)
        head = _head_call(seen)
        layers = [(call.path, call.module) for call in seen.layers]
        first_hidden = _argument(seen.layers[0], _key(calls[0], Kind.HIDDEN))
        last = seen.layers[-1].output
        last = last[0] if calls[-1].num_results else last
        norm = next((call for call in seen.outside if call.output is head.args[0]), None)

        self.hidden_size = int(first_hidden.shape[-1])
        self.vocab_size = int(seen.output.shape[-1])
        self.embedding, self.head = embedded.module, head.module
        # What arrays being the same object suggests is confirmed below: `h *= 2` keeps it.
        self.is_finished = self._embed_directly = False
        self._norm: nn.Module | None = None
        self._product = getattr(head.module, head.path[-1])
        self._hidden_key = _key(calls[0], Kind.HIDDEN)
        self._num_caches = len(recording.caches)
        # Of each extra argument, which axis from behind has a place per row.
        values = ((key, _argument(seen.layers[0], key)) for key in calls[0].extras)
        self._row_axes = {key: value.shape.index(SECOND) - value.ndim for key, value in values}

        self._until_layers = replace_modules(
            model, {path: override_methods(layer, __call__=_stop) for path, layer in layers}
        )
        self._running = _Running()
        passing = {
            path: override_methods(layer, __call__=self._pass_on(call.num_results))
            for (path, layer), call in zip(layers, calls, strict=True)
        }
        place, name = head.path[:-1], head.path[-1]
        self._until_head = replace_modules(
            model, {**passing, place: override_methods(head.module, **{name: _stop})}
        )
        giving = override_methods(head.module, **{name: lambda *_: self._running.product})
        self._from_head = replace_modules(model, {**passing, place: giving})
        self._shorten(
            embed=first_hidden is embedded.output,
            norm=norm.module if norm is not None and norm.args[0] is last else None,
            finish=head.output is seen.output,
        )

    def _shorten(self, embed: bool, norm: nn.Module | None, finish: bool) -> None:
        """Call parts directly where nothing stands between them, which a probe must confirm."""
        tokens = mx.array([0, self.vocab_size - 1], dtype=mx.int32)
        embedded = self.embed(tokens)
        self._embed_directly = embed and _same(embedded, self.embedding(tokens[None]))
        key = mx.random.key(0)
        hidden = mx.random.normal((1, 2, self.hidden_size), key=key).astype(embedded.dtype)
        if norm is not None and _same(self.norm(hidden), norm(hidden)):
            self._norm = norm
        product = 100 * mx.random.normal((1, 2, self.vocab_size), key=key)
        self.is_finished = finish and _same(self.finish(product), product)

    def _pass_on(self, num_results: int) -> Callable[..., Any]:
        """Return a layer's stand-in, which returns the given hidden state."""

        def run(*_: Any, **__: Any) -> Any:
            given = self._running.hidden
            return (given, *[None] * (num_results - 1)) if num_results else given

        return run

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the first layer's hidden states (1, R, h) of tokens (R,)."""
        if self._embed_directly:
            return cast(mx.array, self.embedding(tokens[None]))
        return self._before_layers(tokens[None], None)[self._hidden_key]

    def _before_layers(self, tokens: mx.array, cache: Any) -> dict[Key, Any]:
        """Return what the first layer is called with for tokens (B, L)."""
        try:
            self._until_layers(tokens, cache=cache)
        except _ReachedError as reached:
            return by_key(reached.args_given, reached.kwargs_given)
        raise AssertionError("the first layer was not reached")

    def norm(self, hidden: mx.array) -> mx.array:
        """Return the head's input for hidden states (B, R, h) after the last layer."""
        if self._norm is not None:
            return cast(mx.array, self._norm(hidden))
        self._running.hidden = hidden
        try:
            self._until_head(mx.zeros((1, 1), dtype=mx.int32), cache=None)
        except _ReachedError as reached:
            return cast(mx.array, reached.args_given[0])
        finally:
            self._running.hidden = None
        raise AssertionError("the head was not reached")

    def product(self, normed: mx.array) -> mx.array:
        """Return the head's product with its weights, before scales and soft-caps."""
        return cast(mx.array, self._product(normed))

    def finish(self, product: mx.array) -> mx.array:
        """Return logits for products of the head, of all tokens or some: (..., n)."""
        if self.is_finished:
            return product
        given = mx.array(product)  # an object of its own: the model may write into it
        self._running.hidden = mx.zeros((1, 1, self.hidden_size), dtype=product.dtype)
        self._running.product = given
        try:
            return cast(mx.array, self._from_head(mx.zeros((1, 1), dtype=mx.int32), cache=None))
        finally:
            self._running.hidden = self._running.product = None

    def extras(self, rows: int, offset: int | mx.array) -> dict[Key, mx.array]:
        """Return what layers are handed beside hidden state, mask and cache, for rows at `offset`.

        The model computes it from positions; rows with positions of their own become entries of a
        batch, as in `RowRope`. All layers of a pass get the same.
        """
        last = self._running.last_extras
        if last is not None and last[0] == rows and last[1] is offset:
            return last[2]
        if isinstance(offset, mx.array):
            alone = [_Positions(offset.reshape(-1))] * self._num_caches
            found = self._before_layers(mx.zeros((offset.size, 1), dtype=mx.int32), alone)
            values = {key: _rows(found[key], rows, axis) for key, axis in self._row_axes.items()}
        else:
            together = [_Positions(offset)] * self._num_caches
            found = self._before_layers(mx.zeros((1, rows), dtype=mx.int32), together)
            values = {key: found[key] for key in self._row_axes}
        self._running.last_extras = (rows, offset, values)
        return values


def _rows(value: mx.array, rows: int, axis: int) -> mx.array:
    """Return (B, ..., R, ...) for values (B·R, ..., 1, ...) of rows alone, R at `axis`."""
    apart = value.reshape(-1, rows, *value.shape[1:]).squeeze(axis)
    return mx.moveaxis(apart, 1, axis)


def _embedding_call(seen: Pass) -> Called:
    """Return the call that embedded the tokens."""
    for call in seen.outside:
        if call.path[-1] == "__call__" and isinstance(call.module, EMBEDDINGS):
            return call
    raise ModelError("its token embeddings cannot be found")


def _head_call(seen: Pass) -> Called:
    """Return the call that multiplied with the head's weights."""
    for call in reversed(seen.outside):
        is_head = call.path[-1] == "as_linear" or isinstance(call.module, LINEARS)
        if is_head and call.output.shape[-1] == seen.output.shape[-1]:
            return call
    raise ModelError("its head is no module: it multiplies by the weights itself")


def _same(found: mx.array, expected: mx.array) -> bool:
    return bool(mx.array_equal(found, expected, equal_nan=True).item())


def _stop(_: nn.Module, *args: Any, **kwargs: Any) -> None:
    raise _ReachedError(args, kwargs)


def _key(call: LayerCall, kind: Kind) -> Key:
    return next(key for key, slot in call.arguments if slot.kind is kind)


def _argument(called: Called, key: Key) -> Any:
    return by_key(called.args, called.kwargs)[key]
