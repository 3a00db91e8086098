"""How positions are stretched: what a GGUF file says of it, as config.json has it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .file import GGUFFile
from .sizes import Sizes, refused


def rope_scaling(gguf: GGUFFile, sizes: Sizes) -> dict[str, Any] | None:
    """Return `rope_scaling` of config.json, None where rotation is the plain one.

    Raises:
        CheckpointError: it is of a kind that is not converted.
    """
    family = gguf.text("general.architecture")
    kind = gguf.text(f"{family}.rope.scaling.type", "none")
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, family, sizes)
    if kind == "linear":
        factor = gguf.number(f"{family}.rope.scaling.factor")
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    if kind != "none":
        raise refused(gguf, f"its rope scaling is of the kind {kind!r}, which is not converted")
    return None


def _llama3_scaling(gguf: GGUFFile, family: str, sizes: Sizes) -> dict[str, Any]:
    """Find the Llama 3 settings behind a table of frequency factors, and prove that they give this very table."""
    table = gguf.read("rope_freqs.weight").reshape(-1)
    factor = float(table.max())
    settings = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = gguf.number(f"{family}.rope.freq_base", 10000.0)
    rebuilt = _llama3_factors(base, sizes.head_dim, factor)
    if table.shape != rebuilt.shape or not np.allclose(table, rebuilt, rtol=1e-4):
        raise refused(
            gguf,
            "its table of rope frequencies is not that of Llama 3, the only one that is converted",
        )
    return settings


def _llama3_factors(base: float, head_dim: int, factor: float) -> np.ndarray:
    """Return what Llama 3.1 divides each rotation frequency by: 1 for short waves, `factor` for long ones."""
    waves = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / waves - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)
