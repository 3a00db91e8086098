"""Whether the view of a model computes what mlx-lm does, tried on a few tokens before it is used."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from ..errors import ModelError
from ..machine import ranks, rounds_float32
from .backbone import Backbone
from .cache import KVCache
from .families import refusal
from .masks import RowMask

_TOLERANCE = {mx.float32: 1e-3, mx.float16: 0.1, mx.bfloat16: 0.5}


def probe_tolerance(dtype: mx.Dtype) -> float:
    """Return by how much of their size logits may differ between two ways to compute them.

    Where the GPU takes float32 factors at 10 bits, as much as in float16, which has as many.
    """
    if dtype == mx.float32 and rounds_float32():
        dtype = mx.float16
    return _TOLERANCE.get(dtype, 0.5)


def check_backbone(backbone: Backbone) -> None:
    """Compare the view with mlx-lm's own forward on a probe: prefill, then rows out of order.

    Seven tokens run through mlx-lm; the view computes the first three as a prefill and the
    others as rows with positions and a mask of their own, in two orders.

    Raises:
        ModelError: the logits differ by more than rounding.
    """
    vocab = min(backbone.vocab_size, 997)
    tokens = mx.array([(7 * i * i + 3 * i + 1) % vocab for i in range(7)], dtype=mx.int32)
    expected = backbone.model(tokens[None])[0, 3:].astype(mx.float32)
    try:
        probe = _probe_states if backbone.is_recurrent else _probe_rows
        error = cast(float, mx.abs(probe(backbone, tokens) - expected).max().item())
    except Exception as failed:  # a layer that cannot take rows fails in its own way
        if ranks.is_loss(failed):
            raise
        raise refusal(backbone.family, failed) from failed
    if mx.any(mx.isnan(expected)).item():
        raise ModelError(
            "the model's output is not a number (NaN): its weights are damaged, or overflow in this "
            "precision; check the files or use another dtype."
        )
    scale = max(1.0, cast(float, mx.abs(expected).max().item()))
    tolerance = probe_tolerance(backbone.dtype) * scale
    if backbone.is_recurrent and not error <= tolerance:
        reason = ModelError("its layers' states cannot be kept after every row of a draft")
        raise refusal(backbone.family, reason)
    if not error <= tolerance:
        raise ModelError(
            f"this model (type {backbone.family}) does not compute the same through "
            f"mlx-specstream as in mlx-lm (logits differ by {error:.2g}, allowed {tolerance:.2g}), "
            "so it cannot be decoded exactly; please report it with the model's name."
        )


def _probe_rows(backbone: Backbone, tokens: mx.array) -> mx.array:
    """Return float32 logits (4, V) of the last four tokens, computed as rows out of order."""
    order = mx.array([2, 0, 3, 1], dtype=mx.int32)
    cache = backbone.new_cache()
    backbone.forward(tokens[:3], cache)
    cache.advance(3)
    logits = _row_logits(backbone, tokens[3 + order], 3 + order, cache)
    return mx.take(logits, mx.argsort(order), axis=0)


def _probe_states(backbone: Backbone, tokens: mx.array) -> mx.array:
    """Return float32 logits (4, V) of the last four tokens, two of them after wrong drafts."""
    cache = backbone.new_cache()
    backbone.forward(tokens[:3], cache)
    cache.advance(3)
    positions = mx.arange(3, 7, dtype=mx.int32)
    drafts = mx.concatenate([tokens[3:5], tokens[:2]])
    first = _row_logits(backbone, drafts, positions, cache)[:2]
    cache.advance(2)
    return mx.concatenate([first, _row_logits(backbone, tokens[5:], positions[2:], cache)])


def _row_logits(
    backbone: Backbone, tokens: mx.array, positions: mx.array, cache: KVCache
) -> mx.array:
    """Return float32 logits (R, V) of rows with positions of their own, a chain in some order."""
    keys = mx.concatenate([mx.arange(cache.length, dtype=mx.int32), positions])
    mask = RowMask(keys[None] <= positions[:, None], lambda: (positions, keys))
    every = range(backbone.num_layers)
    hidden = backbone.run(backbone.embed(tokens), every, cache, cache.length, positions, mask)
    return backbone.logits(hidden).astype(mx.float32)
