"""Training the early-exit pruner: next-token loss where the streams join [SS §3.1.3, §4.1].

z = H(norm(M + M·A·B)) of a main row at t, at the input of the first MSA layer, is to foresee
x_{t+1}. Main rows depend on nothing that is trained, so this runs beside the streams' loss and
touches the pruner's weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone
from .base import BaseStates
from .batches import Selection


def exit_rows(batch: Sequence[Selection]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return text, position and next token of every selected main row, each (R,) int32."""
    text = [np.full(len(s.positions), i, dtype=np.int32) for i, s in enumerate(batch)]
    at = [np.array(s.positions, dtype=np.int32) for s in batch]
    target = [
        np.array(s.example.tokens, dtype=np.int32)[row + 1]
        for s, row in zip(batch, at, strict=True)
    ]
    return np.concatenate(text), np.concatenate(at), np.concatenate(target)


def exit_states(
    tensors: Mapping[str, mx.array],
    backbone: Backbone,
    base: BaseStates,
    text: np.ndarray,
    at: np.ndarray,
) -> mx.array:
    """Return the normed early-exit states (R, h) of main rows, differentiable in `tensors`."""
    a, b = (tensors[f"pruner.{name}"].astype(backbone.dtype) for name in ("lora_a", "lora_b"))
    main = base.first[mx.array(text), mx.array(at)]
    return backbone.norm((main + (main @ a) @ b)[None])[0]
