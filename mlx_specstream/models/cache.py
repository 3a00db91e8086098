"""mlx-lm's prompt caches under this package's name; generation takes them as they are."""

from __future__ import annotations

from typing import Any

from mlx_lm.models import cache as _theirs
from mlx_lm.models.cache import can_trim_prompt_cache as can_trim_prompt_cache
from mlx_lm.models.cache import load_prompt_cache as load_prompt_cache
from mlx_lm.models.cache import save_prompt_cache as save_prompt_cache
from mlx_lm.models.cache import trim_prompt_cache as trim_prompt_cache

from ..loading.load import StreamModel


def make_prompt_cache(model: Any, max_kv_size: int | None = None) -> list[Any]:
    """Return an empty cache, one entry a layer, for a model of mlx-lm's or what `load` returns."""
    base = model.model if isinstance(model, StreamModel) else model
    made: list[Any] = _theirs.make_prompt_cache(base, max_kv_size)
    return made


def __getattr__(name: str) -> object:
    """Return mlx-lm's own for every other name."""
    return getattr(_theirs, name)
