"""How a model calls each of its layers, concluded from a recording.

Families differ in the order and names of a layer's arguments, in what they return, and in what
else they hand over. `uniform` makes every layer a `layer(hidden, mask, cache)`:

    h = layer(h, mask, c)                                       llama, and most others
    h = layer(h, attn_scale, mask, cache=c)                     ministral3
    h, kvs, offset = layer(h, mask, c, per_layer_input=None,    gemma4_text
                           shared_kv=None, offset=None)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...errors import ModelError
from .record import FIRST, SECOND, Called, MaskMade, Recording
from .replace import override_methods

Key = int | str
Extras = Callable[[int, int | mx.array], dict[Key, mx.array]]


class Kind(Enum):
    """What an argument of a layer is: `EXTRA` is an array that depends on the rows' positions."""

    HIDDEN = "hidden"
    MASK = "mask"
    CACHE = "cache"
    CONSTANT = "constant"
    OFFSET = "offset"
    EXTRA = "extra"


@dataclass(frozen=True)
class Slot:
    """One argument: what it is, and the value of a constant."""

    kind: Kind
    value: Any = None


@dataclass(frozen=True)
class LayerCall:
    """How one layer is called.

    arguments: by place or name. num_results: how many values the layer returns in a tuple, the
    hidden state first; 0 if it returns the hidden state alone.
    window: sliding window in tokens, None for all. as_array: the mask must be an array.
    cache: the place of the layer's cache in mlx-lm's list, None if it has none.
    slots: of how many arrays the cache is, if it is a state that is overwritten, not rows that
    are appended; else 0.
    """

    arguments: tuple[tuple[Key, Slot], ...]
    num_results: int
    window: int | None
    as_array: bool
    cache: int | None
    slots: int

    @property
    def recurrent(self) -> bool:
        """Tell whether the layer keeps a state."""
        return self.slots > 0

    @property
    def extras(self) -> list[Key]:
        """Return the arguments that depend on the rows' positions."""
        return [key for key, slot in self.arguments if slot.kind is Kind.EXTRA]

    @property
    def is_usual(self) -> bool:
        """Tell whether the layer is called as `layer(hidden, mask, cache)` and returns hidden."""
        usual: dict[Key, Kind] = {0: Kind.HIDDEN, 1: Kind.MASK, 2: Kind.CACHE}
        usual |= {"mask": Kind.MASK, "cache": Kind.CACHE}
        return not self.num_results and all(
            usual.get(key) is slot.kind for key, slot in self.arguments
        )


def layer_calls(recording: Recording) -> list[LayerCall]:
    """Return how each layer is called.

    Raises:
        ModelError: in a way that cannot be repeated for rows of a draft.
    """
    first, second = recording.passes
    for piece in recording.passes:
        if [call.module for call in piece.layers] != recording.layers:
            raise ModelError("it does not run its layers once each and in order")
    before: list[Any] = [None, None]
    calls = []
    for pair in zip(first.layers, second.layers, strict=True):
        calls.append(_layer_call(recording, pair, before))
        for key in calls[-1].extras:
            same = [by_key(call.args, call.kwargs) for call in (second.layers[0], pair[1])]
            if same[0].get(key) is not same[1][key]:
                raise ModelError("it hands its layers inputs of their own beside the hidden state")
        before = [call.output for call in pair]
    return calls


def _layer_call(recording: Recording, pair: tuple[Called, Called], before: list[Any]) -> LayerCall:
    """Conclude how one layer is called from its calls in both pieces."""
    one, two = (by_key(call.args, call.kwargs) for call in pair)
    hidden = _first_result(before[1]) if before[1] is not None else _first_hidden(two)
    if not any(value is hidden for value in two.values()):
        raise ModelError("it computes something between its layers")
    if hidden.ndim != 3 or hidden.shape[1] != SECOND:
        raise ModelError(f"its hidden states have the shape {hidden.shape}, not one row a token")
    masks = recording.passes[1].masks
    slots: list[tuple[Key, Slot]] = []
    for key, value in two.items():
        slots.append((key, _slot(one.get(key), value, hidden, masks, recording.caches)))
    cache = next((slot.value for _, slot in slots if slot.kind is Kind.CACHE), None)
    mask = next((slot.value for _, slot in slots if slot.kind is Kind.MASK), None)
    kind = None if cache is None else type(recording.caches[cache]).__name__
    if kind not in (None, "KVCache", "RotatingKVCache", "ArraysCache"):
        raise ModelError(f"its layers keep a {kind}, which cannot drop a rejected draft")
    windows = [mask.window] if mask is not None and mask.window else []
    if cache is not None and kind == "RotatingKVCache":
        windows.append(recording.caches[cache].max_size)
    if len(set(windows)) > 1:
        seen, held = windows
        raise ModelError(
            f"its masks show a token {seen} rows where its cache holds {held}, so what it computes "
            "depends on how a text is divided into passes"
        )
    return LayerCall(
        arguments=tuple(slots),
        num_results=len(pair[1].output) if isinstance(pair[1].output, tuple) else 0,
        window=min(windows, default=None),
        as_array=mask is not None and mask.as_array,
        cache=cache,
        slots=len(recording.caches[cache].cache)
        if cache is not None and kind == "ArraysCache"
        else 0,
    )


def _slot(one: Any, two: Any, hidden: mx.array, masks: list[MaskMade], caches: list[Any]) -> Slot:
    """Return what an argument is, from its values in both pieces."""
    if two is hidden:
        return Slot(Kind.HIDDEN)
    for made in masks:
        if two is made.mask:
            return Slot(Kind.MASK, made)
    for place, cache in enumerate(caches):
        if two is cache:
            return Slot(Kind.CACHE, place)
    if isinstance(two, mx.array) and isinstance(one, mx.array):
        return Slot(Kind.EXTRA)
    if two is None or isinstance(two, bool | int | float | str):
        if type(one) is type(two) and one == two:
            return Slot(Kind.CONSTANT, two)
        if (one, two) == (0, FIRST):
            return Slot(Kind.OFFSET)
    if isinstance(two, tuple | list):
        raise ModelError("its upper layers use the keys and values of lower ones")
    raise ModelError(f"its layers are handed a {type(two).__name__} that changes from call to call")


def by_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Key, Any]:
    """Return a call's arguments by their places and names."""
    values: dict[Key, Any] = dict(enumerate(args))
    values.update(kwargs)
    return values


def _first_hidden(values: dict[Key, Any]) -> mx.array:
    """Return the first layer's hidden state: its first array of three dimensions."""
    for value in values.values():
        if isinstance(value, mx.array) and value.ndim >= 3:
            return value
    raise ModelError("its first layer is handed no hidden state")


def _first_result(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def uniform(layer: nn.Module, call: LayerCall, extras: Extras) -> nn.Module:
    """Return `layer` as one that is called `layer(hidden, mask, cache)` and returns hidden.

    `cache` has the rows' positions in `cache.offset`.
    """
    if call.is_usual:
        return layer
    original = type(layer).__call__

    def run(self: nn.Module, hidden: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        found = extras(hidden.shape[1], cache.offset) if call.extras else {}
        given = {
            Kind.HIDDEN: hidden,
            Kind.MASK: mask,
            Kind.CACHE: cache,
            Kind.OFFSET: getattr(cache, "offset", 0),
        }
        args, kwargs = [], {}
        for key, slot in call.arguments:
            if slot.kind is Kind.EXTRA:
                value = found[key]
            else:
                value = slot.value if slot.kind is Kind.CONSTANT else given[slot.kind]
            if isinstance(key, int):
                args.append(value)
            else:
                kwargs[key] = value
        return _first_result(original(self, *args, **kwargs))

    result: nn.Module = override_methods(layer, __call__=run)
    return result
