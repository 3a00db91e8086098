"""Layers with a state, run so that every row of a draft leaves one: a chain as a batch.

mlx-lm's recurrent layers can end each entry of a batch at a length of its own, which is how they
serve padded prompts. So a chain of R rows goes through as R entries of one batch, entry i of which
ends after row i. The products with weights, which are what costs, are made for one entry alone:

    x (1, R, h) ──► (R, R, h) ──► in_proj of one entry ──► convolution, recurrence ──► out_proj
                                  shown R times             of all entries              of the last

The last entry's rows are the chain's. What a layer computes is mlx-lm's own code throughout.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ...errors import ModelError
from ..cache.state import StatePass
from .replace import override_methods

LINEARS = (nn.Linear, nn.QuantizedLinear)


class _Batch:
    """Whether a chain is running as a batch whose entries share their rows."""

    def __init__(self) -> None:
        self.shared = False


def keep_states(layer: nn.Module) -> None:
    """Make a recurrent layer's view leave a state after every row of a draft, in place.

    Raises:
        ModelError: it is not clear which part of the layer keeps the state.
    """
    mixers = [
        name
        for name, child in layer.items()
        if isinstance(child, nn.Module) and "cache" in signature(child).parameters
    ]
    if len(mixers) != 1:
        raise ModelError("its recurrent layers do not keep their state in one place")
    batch = _Batch()
    mixer = layer[mixers[0]]
    for name, child in list(mixer.items()):
        if isinstance(child, LINEARS):
            mixer[name] = _once(child, batch)
    layer[mixers[0]] = _by_row(mixer, batch)


def _once(linear: nn.Module, batch: _Batch) -> Any:
    """Return a linear layer that computes entries that are alike once, and shows them to all."""
    original = type(linear).__call__

    def call(self: nn.Module, x: mx.array) -> mx.array:
        if not batch.shared:
            return cast(mx.array, original(self, x))
        y = original(self, x[-1:])
        return mx.broadcast_to(y, (x.shape[0], *y.shape[1:]))

    return override_methods(linear, __call__=call)


def _by_row(mixer: nn.Module, batch: _Batch) -> Any:
    """Return a mixer that runs a draft's rows as a batch."""
    original = type(mixer).__call__

    def call(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if cache is not None and not isinstance(cache, StatePass):
            raise ModelError(
                "a layer that keeps a state was given a cache of rows: make the cache with "
                "`backbone.new_cache()` (training streams for such models is not supported yet)."
            )
        if cache is None:
            return cast(mx.array, original(self, x, mask, cache))
        R = x.shape[1]
        if not cache.open(R):
            return cast(mx.array, original(self, x, None, cache))
        assert cache.lengths is not None
        inside = mx.arange(R) < cache.lengths[:, None]
        batch.shared = True
        try:
            y = original(self, mx.broadcast_to(x, (R, *x.shape[1:])), inside, cache)
        finally:
            batch.shared = False
        return cast(mx.array, y[-1:])

    return override_methods(mixer, __call__=call)
