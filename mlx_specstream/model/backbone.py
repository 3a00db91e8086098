"""A view of an mlx-lm decoder in which every row has its own position and sees what a mask says.

mlx-lm's own layers do the computing; no model file is forked. Two things are replaced, in
shallow copies that share every weight with the user's model, which itself stays untouched:

* RoPE: a layer calls `rope(x, offset=cache.offset)`. `RowRope` lets the offset be a vector with
  a position per row. Without it, the siblings of a draft tree would be verified in wrong places.
* Linear layers of MSA layers, where stream rows get their adapters (`streams.py`).

What differs between families (where the parts are, how layers are called, scales, caps, windows)
is found out by watching the model run: `families/`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..config import CacheConfig
from ..errors import ModelError, OptionError
from .cache import GROWTH, SLACK, KVCache, PassCache, Span, StateLayer, new_cache
from .families import LayerCall, keep_states, refusal, take_apart, uniform
from .masks import Mask, RowMask, causal_mask

SMALL = 2.0**-10  # a logit that no soft-cap changes


class RowRope:
    """RoPE with a position per row: (B, H, R, D) and an offset of shape (R,) or (B, R), or an int.

    mlx's fast RoPE takes one offset per batch entry, so rows become batch entries; the layer's
    own base, scale and frequencies apply, and the result is bit-equal to one call per row.
    """

    def __init__(self, rope: Callable[..., mx.array]) -> None:
        self.rope = rope

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if not isinstance(offset, mx.array) or offset.ndim == 0:
            return self.rope(x, offset=offset)
        B, H, R, D = x.shape
        if offset.size != B * R:
            raise ModelError(f"per-row positions for {B} x {R} rows are {offset.size} in number.")
        rows = x.transpose(0, 2, 1, 3).reshape(B * R, H, 1, D)
        turned = self.rope(rows, offset=offset.reshape(-1))
        return turned.reshape(B, R, H, D).transpose(0, 2, 1, 3)


class Backbone:
    """The parts of a decoder: `embed`, layer k (`run`), `norm`, `head`.

    Raises:
        ModelError: mlx-specstream cannot decode the model's family exactly.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parts = take_apart(model)
        self.family, self.embed_and_head = parts.name, parts.embed_and_head
        self.calls = parts.calls
        self.windows: list[int | None] = [call.window for call in parts.calls]
        self.layers = [
            self._view(layer, call) for layer, call in zip(parts.layers, parts.calls, strict=True)
        ]
        self.num_layers = len(self.layers)
        self.hidden_size = parts.embed_and_head.hidden_size
        self.vocab_size = parts.embed_and_head.vocab_size
        self.dtype = self.embed(mx.zeros((1,), dtype=mx.int32)).dtype
        # Scales behind the head belong to its rows; a soft-cap does not.
        self.is_finished = parts.embed_and_head.is_finished
        self.head_scale = 1.0
        if not self.is_finished:
            small = mx.array([[[SMALL]]])
            self.head_scale = cast(float, parts.embed_and_head.finish(small).item()) / SMALL

    def _view(self, layer: nn.Module, call: LayerCall) -> nn.Module:
        """Return a layer's view: its RoPE takes rows, its state is kept row by row, one call."""
        view = view_layer(layer)
        if call.recurrent:
            try:
                keep_states(view)
            except ModelError as error:
                raise refusal(self.family, error) from error
        return uniform(view, call, self.embed_and_head.extras)

    @property
    def is_recurrent(self) -> bool:
        """Tell whether layers keep a state beside attention: drafts must be chains then."""
        return any(call.recurrent for call in self.calls)

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the input hidden states (1, R, h) of tokens (R,)."""
        return self.embed_and_head.embed(tokens)

    def embedding_rows(self, tokens: mx.array) -> mx.array:
        """Return the bare embedding rows (n, h) of tokens (n,), unscaled."""
        return cast(mx.array, self.embed_and_head.embedding(tokens))

    def norm(self, hidden: mx.array) -> mx.array:
        """Return what the head multiplies, (B, R, h): the final norm of hidden states (B, R, h)."""
        return self.embed_and_head.norm(hidden)

    def head(self, normed: mx.array) -> mx.array:
        """Return logits (1, R, V) of normed hidden states (1, R, h)."""
        return self.embed_and_head.finish(self.embed_and_head.product(normed))

    def head_rows(self, tokens: mx.array) -> mx.array:
        """Return the LM head's rows (n, h) for tokens (n,): logits without the full product.

        A scale that the family applies behind the product is in them; `from_rows` does the rest.
        """
        head = self.embed_and_head.head
        if isinstance(head, nn.Embedding | nn.QuantizedEmbedding):
            rows = cast(mx.array, head(tokens))
        elif isinstance(head, nn.QuantizedLinear):
            biases: mx.array | None = head.get("biases")
            rows = mx.dequantize(
                head.weight[tokens],
                head.scales[tokens],
                biases if biases is None else biases[tokens],
                group_size=head.group_size,
                bits=head.bits,
                mode=head.mode,
            ).astype(self.dtype)
        else:
            rows = head.weight[tokens]
        return rows if self.head_scale == 1.0 else rows * self.head_scale

    def from_rows(self, products: mx.array, tokens: mx.array) -> mx.array:
        """Return logits (..., n) for products (..., n) of normed states with the tokens' rows.

        Adds what `head_rows` leaves out: the head's bias, and the family's soft-cap.
        """
        bias: mx.array | None = self.embed_and_head.head.get("bias")
        if self.head_scale != 1.0:
            products = products / self.head_scale
        if bias is not None:
            products = products + bias[tokens]
        return self.embed_and_head.finish(products)

    def mask(self, index: int, mask: RowMask, span: Span | None) -> Mask:
        """Return the mask of layer `index`: its window's, and an array where it must be one.

        span: the columns that the layer's cache shows, as `RowMask.of` takes them.
        """
        found = mask.of(self.windows[index], span)
        return mask.as_array() if found == "causal" and self.calls[index].as_array else found

    def new_cache(
        self, config: CacheConfig | None = None, slack: int = SLACK, drop: int = GROWTH
    ) -> KVCache:
        """Return an empty cache for this model: sliding layers hold their window alone.

        slack, drop: what else they hold for a while, see `cache.new_cache`.

        Raises:
            OptionError: the config does not fit the model.
        """
        cache = new_cache(self.windows, config, slack, drop)
        if self.is_recurrent and cache.quantize is not None:
            raise OptionError(
                "kv_bits cannot be used with this model: some of its layers keep a state, which is "
                "not quantised; leave kv_bits out."
            )
        for index, call in enumerate(self.calls):
            if call.recurrent:
                cache.layers[index] = StateLayer(call.slots)
        return cache

    def run(
        self,
        hidden: mx.array,
        layers: range,
        cache: PassCache,
        start: int,
        offset: int | mx.array,
        mask: RowMask,
    ) -> mx.array:
        """Run `layers` of the base model over rows (B, R, h), which go to the cache at `start`."""
        for index in layers:
            row = cache.view(index, start, offset)
            hidden = self.layers[index](hidden, self.mask(index, mask, row.span), row)
        return hidden

    def forward(self, tokens: mx.array, cache: KVCache, last_only: bool = True) -> mx.array:
        """Append consecutive tokens (R,) to the committed text and return the hidden states.

        Returns (1, R, h) before the final norm, or (1, 1, h) of the last row. Call
        `cache.advance(R)` once the result is to count.
        """
        R = tokens.shape[0]
        mask = causal_mask(cache.length, R)
        hidden = self.run(
            self.embed(tokens), range(self.num_layers), cache, cache.length, cache.length, mask
        )
        return hidden[:, -1:] if last_only else hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits (R, V) of hidden states (1, R, h) before the final norm."""
        return self.head(self.norm(hidden))[0]


def view_layer(layer: nn.Module) -> nn.Module:
    """Return a shallow copy of a decoder layer, sharing its weights, whose RoPE takes rows."""
    view = copy.copy(layer)
    for name, child in list(view.items()):
        if _is_rope(name, child):
            # Past nn.Module's own bookkeeping: RowRope holds no parameters of its own.
            dict.pop(view, name)
            object.__setattr__(view, name, RowRope(child))
        elif isinstance(child, nn.Module):
            view[name] = view_layer(child)
    return view


def _is_rope(name: str, module: Any) -> bool:
    """Tell whether the child `name` rotates by position."""
    if not isinstance(module, nn.Module):
        return False
    words = f"{name} {type(module).__name__}".lower()
    return ("rope" in words or "rotary" in words) and "offset" in signature(module).parameters
