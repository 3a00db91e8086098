"""The machine: what it is, and on Linux the matrix library that MLX computes with.

| file | the idea it holds |
|---|---|
| `describe.py` | chip, memory, system, MLX with its back end, and versions |
| `blas.py` | find a fast BLAS and have MLX use it, before or after MLX is imported |
| `relink.py` | have a loaded library call another's functions |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .blas import BLAS_ADVICE, REFERENCE_BLAS

if TYPE_CHECKING:
    from .describe import Machine as Machine

__all__ = ["BLAS_ADVICE", "REFERENCE_BLAS", "Machine"]


def __getattr__(name: str) -> object:
    """Import `describe.py` when asked for: every import of the package comes through here."""
    if name != "Machine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .describe import Machine

    return Machine
