"""The machine: what it is, and on Linux the matrix library that MLX computes with.

| file | the idea it holds |
|---|---|
| `describe.py` | chip, memory, system, MLX with its back end, and versions |
| `blas.py` | find a fast BLAS and have MLX use it, before or after MLX is imported |
| `folders.py` | where a user's own things are kept |
| `relink.py` | have a loaded library call another's functions |
| `parts.py` | linear layers of which every process holds a part |
| `ranks.py` | several processes that decode as one: who leads, and what it tells the others |
| `load.py` | whether other programs keep the machine busy |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .blas import BLAS_ADVICE, REFERENCE_BLAS

if TYPE_CHECKING:
    from .describe import TF32 as TF32
    from .describe import Machine as Machine
    from .describe import keep_float32_exact as keep_float32_exact
    from .describe import rounds_float32 as rounds_float32

__all__ = [
    "BLAS_ADVICE",
    "REFERENCE_BLAS",
    "TF32",
    "Machine",
    "keep_float32_exact",
    "rounds_float32",
]


def __getattr__(name: str) -> object:
    """Import `describe.py` when asked for: every import of the package comes through here."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import describe

    return getattr(describe, name)
