"""The same rows as mlx-lm's own cache objects hold them, both ways.

Kinds are told by the names of mlx-lm's classes: `KVCache`, `RotatingKVCache`, `QuantizedKVCache`.
Fields are read and set, not `state`, whose form differs between versions of mlx-lm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ...errors import OptionError
from .kv import KVCache
from .quantized import Quantization, QuantizedLayer
from .rotating import SLACK, RotatingLayer
from .rows import LayerKV
from .state import StateLayer


def from_mlx_lm(
    caches: list[Any],
    windows: Sequence[int | None] | None = None,
    quantize: Quantization | None = None,
) -> KVCache:
    """Return a cache over the rows that mlx-lm's cache objects hold, one object a layer.

    Args:
        windows: the layers' sliding windows, if they are to be checked against the caches.

    Raises:
        OptionError: a kind of cache that is not supported, layers of different lengths, or a
            rotating cache that does not fit its layer's window.
    """
    if not caches:
        raise OptionError(_WANTED)
    lengths = {_offset(cache) for cache in caches if type(cache).__name__ != "ArraysCache"}
    if len(lengths) != 1:
        raise OptionError(f"the prompt cache's layers hold different numbers of rows; {_WANTED}")
    length = lengths.pop()
    if windows is not None and len(windows) != len(caches):
        raise OptionError(
            f"the prompt cache has {len(caches)} layers and the model {len(windows)}; {_WANTED}"
        )
    layers = [_layer(cache, length) for cache in caches]
    for layer, window in zip(layers, windows or [None] * len(layers), strict=True):
        rotates = isinstance(layer, RotatingLayer) and (layer.size, layer.keep) != (window, 0)
        if window is not None and (rotates or isinstance(layer, QuantizedLayer)):
            raise OptionError(
                f"the prompt cache does not fit the model's sliding window of {window}; {_WANTED}"
            )
    return KVCache.of(layers, length, quantize)


def to_mlx_lm(cache: KVCache, caches: list[Any]) -> None:
    """Put the committed rows into mlx-lm's cache objects, which forget what they had.

    Layers that have turned quantised replace their object in the list, as mlx-lm has it.

    Raises:
        OptionError: other kinds of caches, or another number of layers.
    """
    if len(caches) != len(cache.layers) or not all(
        _fits(layer, other) for layer, other in zip(cache.layers, caches, strict=True)
    ):
        raise OptionError(_WANTED)
    _check_all_attend(cache)
    cache.turn_quantized()
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, QuantizedLayer) and not hasattr(caches[index], "bits"):
            caches[index] = _made(layer)
        _fill(caches[index], layer, cache.length)


def as_mlx_lm(cache: KVCache) -> list[Any]:
    """Return new cache objects of mlx-lm with the committed rows."""
    cache.turn_quantized()
    caches = [_made(layer) for layer in cache.layers]
    to_mlx_lm(cache, caches)
    return caches


def _check_all_attend(cache: KVCache) -> None:
    """Refuse a text of which a layer holds nothing.

    Raises:
        OptionError: there is one.
    """
    if cache.length and any(layer.keys is None for layer in cache.layers if type(layer) is LayerKV):
        raise OptionError(
            "this model has layers without attention, for which mlx-lm keeps no cache: its prompt "
            "caches cannot be exchanged with mlx-lm; leave prompt_cache and prompt cache files out."
        )


_WANTED = (
    "the prompt cache must be made of mlx-lm's KVCache, RotatingKVCache or QuantizedKVCache "
    "layers of one length; make it with mlx_lm.models.cache.make_prompt_cache(model)."
)


def _offset(cache: Any) -> int:
    try:
        return int(cache.offset)
    except (AttributeError, TypeError, ValueError):
        raise OptionError(f"the prompt cache has a {type(cache).__name__}; {_WANTED}") from None


def _layer(cache: Any, length: int) -> LayerKV:
    """Return our layer with the first `length` rows of the text of one of mlx-lm's."""
    name = type(cache).__name__
    if name == "KVCache":
        layer = LayerKV()
        if length:
            layer.write(0, cache.keys[..., :length, :], cache.values[..., :length, :])
        return layer
    if name == "QuantizedKVCache":
        packed = QuantizedLayer(cache.bits, cache.group_size)
        if length:
            keys, values = (
                tuple(part[..., :length, :] for part in parts)
                for parts in (cache.keys, cache.values)
            )
            packed.write_packed(0, keys, values)
        return packed
    if name == "RotatingKVCache":
        return _rotating(cache, length)
    if name == "ArraysCache":
        state = StateLayer(len(cache.cache))
        state.set(length, list(cache.cache))
        return state
    raise OptionError(f"the prompt cache has a {name}; {_WANTED}")


def _rotating(cache: Any, length: int) -> RotatingLayer:
    """Return the rows of a `RotatingKVCache`, which lie in a ring behind the first `keep`."""
    size, keep = int(cache.max_size), int(cache.keep)
    if not 0 <= keep < size:
        raise OptionError(
            f"a rotating cache of {size} rows cannot keep the first {keep}; make it larger."
        )
    layer = RotatingLayer(size, keep, SLACK)
    if not length:
        return layer
    keys, values = (
        _in_order(array, cache._idx, length, keep) for array in (cache.keys, cache.values)
    )
    held = keys.shape[2]
    if held < min(length, size - 1):
        raise OptionError(f"a rotating cache holds {held} of the {min(length, size)} rows it must.")
    if held < length:
        stay = mx.arange(keep)
        if keep:
            layer.kept = (mx.take(keys, stay, axis=2), mx.take(values, stay, axis=2))
        layer.dropped = length - (held - keep)
        keys, values = keys[..., keep:, :], values[..., keep:, :]
    layer.write(layer.dropped, keys, values)
    return layer


def _in_order(ring: mx.array, next_row: int, length: int, keep: int) -> mx.array:
    """Return a ring's rows in the order of the text: the first ones, then from the oldest on."""
    if next_row == ring.shape[2]:
        return ring
    if next_row < length:
        parts = [ring[..., :keep, :], ring[..., next_row:, :], ring[..., keep:next_row, :]]
        return mx.concatenate(parts, axis=2)
    return ring[..., :next_row, :]


def _fits(layer: LayerKV, cache: Any) -> bool:
    """Tell whether mlx-lm's object is of the layer's kind, or may turn into it."""
    name = type(cache).__name__
    if isinstance(layer, RotatingLayer):
        return name == "RotatingKVCache" and (cache.max_size, cache.keep) == (
            layer.size,
            layer.keep,
        )
    if isinstance(layer, StateLayer):
        return name == "ArraysCache" and len(cache.cache) == layer.slots
    if isinstance(layer, QuantizedLayer):
        if name == "QuantizedKVCache":
            return bool((cache.bits, cache.group_size) == (layer.bits, layer.group_size))
        return name == "KVCache"
    return name == "KVCache"


def _made(layer: LayerKV) -> Any:
    """Return an empty cache object of mlx-lm of the layer's kind."""
    from mlx_lm.models import cache

    if isinstance(layer, RotatingLayer):
        return cache.RotatingKVCache(max_size=layer.size, keep=layer.keep)
    if isinstance(layer, StateLayer):
        return cache.ArraysCache(size=layer.slots)
    if isinstance(layer, QuantizedLayer):
        return cache.QuantizedKVCache(group_size=layer.group_size, bits=layer.bits)
    return cache.KVCache()


def _fill(cache: Any, layer: LayerKV, length: int) -> None:
    if isinstance(layer, StateLayer):
        cache.cache = list(layer.after(length) or [None] * layer.slots)
        return
    cache.offset = length
    if isinstance(layer, RotatingLayer):
        cache._idx = min(length, layer.size)
    if not length:
        cache.keys = cache.values = None
    elif isinstance(layer, RotatingLayer):
        keys, values = layer.between(layer.span.needed, length)
        if layer.kept is not None and layer.span.wrapped:
            keys = mx.concatenate([layer.kept[0], keys], axis=2)
            values = mx.concatenate([layer.kept[1], values], axis=2)
        cache.keys, cache.values = keys, values
    elif isinstance(layer, QuantizedLayer):
        cache.keys, cache.values = layer.read_packed(length)
    else:
        cache.keys, cache.values = layer.read(length)
