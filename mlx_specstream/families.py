"""The families of mlx-lm models that can be decoded, one row each; everything else is refused.

A row says where a family keeps its parts and what it does outside of its layers. What happens
inside a layer is the layer's own code and needs no word here, as long as it takes
`(x, mask, cache)`, rotates by `cache.offset` and attends what `cache.update_and_fetch` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import ModelError


@dataclass(frozen=True)
class Parts:
    """A decoder taken apart: modules of the user's model, none of them copied.

    `windows` holds each layer's sliding window in tokens, None for full attention.
    """

    embedding: nn.Module
    layers: list[nn.Module]
    norm: nn.Module
    head: Callable[[mx.array], mx.array]
    windows: list[int | None]


@dataclass(frozen=True)
class Family:
    """How to take models of one mlx-lm module apart."""

    name: str
    parts: Callable[[Any], Parts]
    scale_embedding: Callable[[Any, mx.array], mx.array] = lambda _, embedded: embedded


def _parts(model: Any) -> Parts:
    """Take apart the layout that llama set: `model.model.{embed_tokens, layers, norm}`."""
    inner = model.model
    head = inner.embed_tokens.as_linear if model.args.tie_word_embeddings else model.lm_head
    window = getattr(inner, "sliding_window", None)
    windows = [
        int(window) if window and getattr(layer, "use_sliding", False) else None
        for layer in inner.layers
    ]
    return Parts(inner.embed_tokens, list(inner.layers), inner.norm, head, windows)


# Keyed by the mlx-lm module that defines the model class; mistral is mlx-lm's llama.
FAMILIES: dict[str, Family] = {
    name: Family(name, _parts) for name in ("llama", "mistral", "qwen2", "qwen3")
}


def family_of(model: nn.Module) -> Family:
    """Return the row for `model`.

    Raises:
        ModelError: the family is not supported.
    """
    name = type(model).__module__.rpartition(".")[2]
    if name not in FAMILIES:
        raise ModelError(
            f"models of type {name!r} are not supported yet; supported are "
            f"{', '.join(sorted(FAMILIES))}: use mlx-lm itself for this one."
        )
    return FAMILIES[name]
