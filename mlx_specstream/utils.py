"""mlx-lm's utilities under this package's name; `load` is the package's own, with streams."""

from __future__ import annotations

from mlx_lm import utils as _theirs

from .loading.load import load as load


def __getattr__(name: str) -> object:
    """Return mlx-lm's own for every other name."""
    return getattr(_theirs, name)
