"""Watch a model of mlx-lm run: what it hands to its layers, and what it does around them.

Seven tokens go through the model's own forward, in two pieces, with mlx-lm's own caches. Layers,
embeddings, norms and heads are spied on; arrays are told apart by identity, so nothing is
computed and no weight is read. `calls.py` draws the conclusions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ...errors import ModelError
from .replace import Path, find_list, modules, override_methods, replace_modules

FIRST, SECOND = 3, 4  # tokens in the two pieces


@dataclass(frozen=True)
class Called:
    """One call of a module: where it is, what went in, what came out."""

    path: Path
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class MaskMade:
    """A mask that the model asked a cache for. `window` in tokens, None for all."""

    mask: mx.array
    window: int | None
    as_array: bool


@dataclass
class Pass:
    """What was seen of one piece. `layers` in the order of their calls; outside: those of other modules."""

    layers: list[Called] = field(default_factory=list)
    outside: list[Called] = field(default_factory=list)
    masks: list[MaskMade] = field(default_factory=list)
    output: Any = None


@dataclass(frozen=True)
class Recording:
    """What was seen of a model: its layers, their caches, and the two pieces.

    owner: the path of the list of layers. caches: mlx-lm's own, in its order.
    """

    model: nn.Module
    owner: Path
    layers: list[nn.Module]
    caches: list[Any]
    passes: tuple[Pass, Pass]


def record(model: nn.Module) -> Recording:
    """Watch `model` run.

    Raises:
        ModelError: its layers cannot be found.
    """
    layers = list(getattr(model, "layers", None) or [])
    found = find_list(model, layers)
    if found is None:
        raise ModelError("it does not keep its layers in a list")
    owner, everything = found
    first = len(everything) - len(layers)
    caches: list[Any] = list(make_prompt_cache(model))
    seen = (Pass(), Pass())
    current = [seen[0]]

    def spy(path: Path, module: nn.Module, name: str, log: Callable[[Pass], list[Called]]) -> Any:
        original = getattr(type(module), name)

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            log(current[0]).append(Called(path, module, args, kwargs, output))
            return output

        return call

    changes: dict[Path, Any] = {}
    for number, layer in enumerate(layers):
        path = (*owner, str(first + number))
        changes[path] = override_methods(
            layer, __call__=spy(path, layer, "__call__", lambda p: p.layers)
        )
    for path, module in modules(model, outside=owner):
        names = [n for n in ("__call__", "as_linear") if _is_leaf(module) and hasattr(module, n)]
        if names and path:
            spies = {n: spy((*path, n), module, n, lambda p: p.outside) for n in names}
            changes[path] = override_methods(module, **spies)
    for cache in flat_caches(caches):
        _spy_masks(cache, current)
    view = replace_modules(model, changes)
    for piece, length in zip(seen, (FIRST, SECOND), strict=True):
        current[0] = piece
        tokens = mx.arange(1, 1 + length, dtype=mx.int32)[None]
        piece.output = view(tokens, cache=caches)
    return Recording(model, owner, layers, caches, seen)


def flat_caches(caches: list[Any]) -> list[Any]:
    """Return caches with those in a CacheList one by one."""
    flat: list[Any] = []
    for cache in caches:
        inner = getattr(cache, "caches", None)
        flat += flat_caches(list(inner)) if isinstance(inner, tuple | list) else [cache]
    return flat


def _is_leaf(module: nn.Module) -> bool:
    """Tell whether a module holds parameters and no other modules."""
    return not any(isinstance(child, nn.Module | list) for child in module.values())


def _spy_masks(cache: Any, current: list[Pass]) -> None:
    """Note the masks that attention caches make; they are arrays here, so that each is itself."""
    if not hasattr(cache, "offset") or not hasattr(cache, "make_mask"):
        return
    original = cache.make_mask

    def make_mask(N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        mask = original(N, return_array=True, window_size=window_size)
        window = window_size or getattr(cache, "max_size", None)
        current[0].masks.append(MaskMade(mask, window, return_array))
        return mask

    cache.make_mask = make_mask
