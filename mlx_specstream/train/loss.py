"""The training loss of lossless mode [SS Eq. 5, α_0 = 0], of one pass over some segments.

    Σ_j α_j CE(stream j, x_{t+1+j})  +  Σ_j α_j CE(stream j given its parent x_{t+j}, x_{t+1+j})

The first part trains the streams, to the text's token and to the frozen model's distribution
[own]; the second trains the parent-conditioned correction (`condition.py`), if there is one,
together with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..config import StreamConfig
from ..model.backbone import Backbone
from ..speculation.condition import Conditioner
from ..speculation.streams import Streams
from .base import BaseStates
from .head import Head, cross_entropy
from .segments import Segments, stream_states
from .targets import TargetRows

Tensors = dict[str, mx.array]
ADAPTER = ("lora_a", "lora_b")


@dataclass(frozen=True)
class PassLoss:
    """One pass's share of the loss, and each row's cross-entropy for the record.

    total: (), float32, the only part with a gradient. marginal, conditioned: (R,).
    """

    total: mx.array
    marginal: mx.array
    conditioned: mx.array | None

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.total, self.marginal, self.conditioned) if a is not None]


def conditioner_of(tensors: Mapping[str, mx.array], dtype: mx.Dtype) -> Conditioner:
    """Return the conditioner among the stream weights, in the dtype it computes in."""
    names = ("mlp_in", "mlp_out", "lora_a", "lora_b")
    return Conditioner(*(tensors[f"conditioner.{name}"].astype(dtype) for name in names))


def stream_loss(
    hidden: mx.array,
    tensors: Mapping[str, mx.array],
    backbone: Backbone,
    rows: TargetRows,
    weights: np.ndarray,
    head: Head,
    teacher: mx.array | None = None,
    soft: float = 0.0,
) -> PassLoss:
    """Return the loss of stream rows.

    hidden: (R, h), their final normed states. weights: (γ,), what a row of each stream counts.
    teacher: (R, h), the frozen model's states for the same targets.
    """
    row_weights = weights[rows.stream]
    total, marginal = cross_entropy(hidden, head, rows.target, row_weights, teacher, soft)
    conditioned = None
    if "conditioner.mlp_in" in tensors:
        conditioner = conditioner_of(tensors, backbone.dtype)
        parents, before = (
            backbone.embedding_rows(mx.array(ids)) for ids in (rows.parent, rows.grandparent)
        )
        corrected = hidden + conditioner.correction(parents, hidden, before)
        extra, conditioned = cross_entropy(corrected, head, rows.target, row_weights, teacher, soft)
        total = total + extra
    return PassLoss(total, marginal, conditioned)


def lossless_loss(
    tensors: Tensors,
    backbone: Backbone,
    config: StreamConfig,
    base: BaseStates,
    segments: Segments,
    rows: TargetRows,
    weights: np.ndarray,
    head: Head,
    soft: float = 0.0,
    checkpoint: bool = False,
) -> PassLoss:
    """Return the loss of one pass; differentiable in `tensors` (float32) alone."""
    streams = Streams(backbone, config, tensors)
    if checkpoint:
        recompute_layers(streams)
    hidden = stream_states(streams, base, segments)
    hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(rows.index)]
    teacher = base.last[mx.array(rows.text), mx.array(rows.teacher)] if soft else None
    return stream_loss(hidden, tensors, backbone, rows, weights, head, teacher, soft)


def recompute_layers(streams: Streams) -> None:
    """Make the MSA layers forget their insides and compute them again on the way back.

    Saves the memory of everything but the layers' inputs, for about a third more time.
    """
    for index in streams.upper:
        streams.layers[index] = _Recomputed(streams.layers[index])


class _Recomputed(nn.Module):
    """A layer under `mx.checkpoint`; its adapters are passed in so that they get gradients."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __call__(self, hidden: mx.array, mask: object, row: object) -> mx.array:
        layer = self.layer
        flat: list[tuple[str, mx.array]] = tree_flatten(layer.parameters())  # type: ignore[assignment]
        adapters = [(name, array) for name, array in flat if name.endswith(ADAPTER)]
        names = [name for name, _ in adapters]

        # What has a gradient must be an argument: the mask holds the gates of shared mode.
        masks = [mask] if isinstance(mask, mx.array) else []

        def inner(hidden: mx.array, *arrays: mx.array) -> mx.array:
            own = arrays[len(masks) :]
            layer.update(tree_unflatten(list(zip(names, own, strict=True))))
            return cast(mx.array, layer(hidden, arrays[0] if masks else mask, row))

        return mx.checkpoint(inner)(hidden, *masks, *(array for _, array in adapters))
