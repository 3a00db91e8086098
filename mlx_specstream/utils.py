"""mlx-lm's utilities under this package's name; `load` is the package's own, with streams."""

from __future__ import annotations

from typing import Any

from mlx_lm import utils as _theirs

from .loading.load import StreamModel
from .loading.load import load as load


def compute_bits_per_weight(model: Any) -> float:
    """Return the bits of a weight, on average, of a model of mlx-lm's or what `load` returns."""
    base = model.model if isinstance(model, StreamModel) else model
    return float(_theirs.compute_bits_per_weight(base))


def __getattr__(name: str) -> object:
    """Return mlx-lm's own for every other name."""
    return getattr(_theirs, name)
