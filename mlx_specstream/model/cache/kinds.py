"""Which kind of cache each layer gets, from the model's windows and a `CacheConfig`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from ...config import CacheConfig
from ...errors import OptionError
from ...machine import ranks
from .kv import KVCache
from .quantized import Quantization
from .rotating import SLACK, RotatingLayer
from .rows import GROWTH, LayerKV

KEEP = 4  # first rows that stay under max_kv_size, as mlx-lm has it


def new_cache(
    windows: Sequence[int | None],
    config: CacheConfig | None = None,
    slack: int = SLACK,
    drop: int = GROWTH,
) -> KVCache:
    """Return an empty cache for layers with these sliding windows (None: full attention).

    Sliding layers hold their window, the others everything, or the last `max_kv_size` rows and
    the first four. `slack`: how many rows beyond a window to keep, for rewinding; `drop`: how
    many more may gather before they are dropped.

    Raises:
        OptionError: the config asks to quantise layers that rotate.
    """
    config = config or CacheConfig()
    check_config(config, windows)
    layers: list[LayerKV] = []
    for window in windows:
        if window is not None:
            layers.append(RotatingLayer(window, 0, slack, drop))
        elif config.max_kv_size is not None:
            layers.append(RotatingLayer(config.max_kv_size, KEEP, slack, drop))
        else:
            layers.append(LayerKV())
    return KVCache.of(layers, quantize=quantization(config))


def quantization(config: CacheConfig) -> Quantization | None:
    """Return how the config has rows stored, None for unquantised."""
    if config.kv_bits is None:
        return None
    return Quantization(config.kv_bits, config.kv_group_size, config.quantized_kv_start)


def check_config(config: CacheConfig, windows: Sequence[int | None]) -> None:
    """Refuse what these layers cannot have.

    Raises:
        OptionError: quantised rows, and a layer with a sliding window.
    """
    if config.kv_bits is not None and any(window is not None for window in windows):
        raise OptionError(
            "kv_bits cannot be used with this model: it has sliding-window layers, whose rotating "
            "caches mlx-lm does not quantise; leave kv_bits out."
        )


def check_quantised(
    forward: Callable[[mx.array, KVCache], mx.array],
    windows: Sequence[int | None],
    config: CacheConfig,
) -> None:
    """Try a pass of one row over a quantised cache, if the config asks for one.

    Raises:
        OptionError: the model's heads do not divide into groups, or its attention is not
            mlx-lm's own, which alone reads quantised rows.
    """
    if config.kv_bits is None:
        return
    cache = new_cache(windows, replace(config, quantized_kv_start=0))
    cache.advance(0)
    try:
        mx.eval(forward(mx.array([0]), cache))
    except Exception as error:  # whatever mlx and mlx-lm raise
        if ranks.is_loss(error):
            raise
        raise OptionError(
            f"this model cannot use a cache of {config.kv_bits} bits in groups of "
            f"{config.kv_group_size}: its heads do not divide into such groups, or its attention "
            "reads no quantised rows; try another kv_group_size, or leave kv_bits out."
        ) from error
