"""Whether a model's requests can be batched exactly: asked of its layers, and tried on a probe.

mlx-lm's layers take batches, but not all of them a mask per sequence: some would mix sequences
up without a word where the batch is as large as a group of heads.
"""

from __future__ import annotations

from typing import cast
from weakref import WeakSet

import mlx.core as mx

from ..errors import ModelError
from ..machine import ranks
from ..model.backbone import Backbone
from ..model.cache import KVCache, LayerKV, RotatingLayer
from ..model.probe import probe_tolerance
from .cache import BatchKVCache
from .rows import main_rows

_ROWS = 2  # of each text, in the batched pass
_checked: WeakSet[Backbone] = WeakSet()


def check_model(backbone: Backbone) -> None:
    """Refuse a model that cannot be batched exactly; what was found good is not tried again.

    Sliding windows are no obstacle: here their layers keep every row, and masks hide the old ones.

    Raises:
        ModelError: layers keep something else than keys and values, or compute otherwise in a
            batch than alone.
    """
    if backbone in _checked:
        return
    kinds = {type(layer) for layer in backbone.new_cache().layers}
    if not kinds <= {LayerKV, RotatingLayer} or any(call.recurrent for call in backbone.calls):
        raise _refusal(backbone, "it has layers that keep a state in place of keys and values")
    vocab = min(backbone.vocab_size, 997)
    tokens = [(7 * i * i + 3 * i + 1) % vocab for i in range(8)]
    texts = [tokens[:6], tokens[6:]]
    try:
        found = _in_a_batch(backbone, texts)
    except (ValueError, TypeError, RuntimeError) as error:
        if ranks.is_loss(error):
            raise
        reason = "its layers do not take a mask per sequence"
        raise _refusal(backbone, reason) from error
    expected = mx.stack([_alone(backbone, text) for text in texts]).astype(mx.float32)
    distance = cast(float, mx.abs(found - expected).max().item())
    scale = max(1.0, cast(float, mx.abs(expected).max().item()))
    if not distance <= probe_tolerance(backbone.dtype) * scale:
        raise _refusal(backbone, f"logits in a batch differ by {distance:.2g} from those alone")
    _checked.add(backbone)


def _in_a_batch(backbone: Backbone, texts: list[list[int]]) -> mx.array:
    """Return the logits (B, rows, V) float32 of the texts' last rows, computed together."""
    cache = BatchKVCache(backbone.num_layers)
    for text in texts:
        own, before = KVCache(backbone.num_layers), text[:-_ROWS]
        if before:
            hidden = backbone.forward(mx.array(before, dtype=mx.int32), own)
            own.advance(len(before))
            mx.eval(hidden)  # a message, where layers are divided among processes
        cache.join(own)
    cache.reserve(_ROWS)
    rows = main_rows(cache, _ROWS)
    tokens = mx.array([text[-_ROWS:] for text in texts], dtype=mx.int32)
    hidden = backbone.embed(tokens.reshape(-1)).reshape(len(texts), _ROWS, -1)
    every = range(backbone.num_layers)
    hidden = backbone.run(hidden, every, rows.cache, 0, rows.positions, rows.mask)
    logits = backbone.head(backbone.norm(hidden)).astype(mx.float32)
    mx.eval(logits)
    return logits


def _alone(backbone: Backbone, text: list[int]) -> mx.array:
    """Return the logits (rows, V) of a text's last rows: mlx-lm's, unless layers are elsewhere."""
    if len(backbone.stages.own) == backbone.num_layers:
        return cast(mx.array, backbone.model(mx.array([text]))[0, -_ROWS:])
    tokens = mx.array(text, dtype=mx.int32)
    hidden = backbone.forward(tokens, KVCache(backbone.num_layers), last_only=False)
    mx.eval(hidden)  # one text's messages before the next one's, in every process
    return backbone.logits(hidden)[-_ROWS:]


def _refusal(backbone: Backbone, reason: str) -> ModelError:
    return ModelError(
        f"requests to models of type {backbone.family!r} cannot be batched ({reason}); decode "
        "them one at a time."
    )
