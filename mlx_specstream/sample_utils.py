"""mlx-lm's samplers and logits processors under this package's name; generation takes them as they are."""

from __future__ import annotations

from mlx_lm import sample_utils as _theirs
from mlx_lm.sample_utils import make_logits_processors as make_logits_processors
from mlx_lm.sample_utils import make_sampler as make_sampler


def __getattr__(name: str) -> object:
    """Return mlx-lm's own for every other name."""
    return getattr(_theirs, name)
