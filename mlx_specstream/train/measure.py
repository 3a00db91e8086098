"""Where the true token stands among each stream's candidates (`figures.py` says what that means)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone
from ..speculation.condition import NUM_CANDIDATES, Conditioner, top_candidates
from .figures import Ranks
from .targets import TargetRows

CHUNK = 256


def rank(
    hidden: mx.array,
    rows: TargetRows,
    num_positions: int,
    num_streams: int,
    backbone: Backbone,
    conditioner: Conditioner | None,
) -> Ranks:
    """Rank the targets of a pass, hidden (R, h) being the states of `rows`."""
    places, corrected, losses = [], [], []
    for start in range(0, len(rows), CHUNK):
        at = slice(start, start + CHUNK)
        states, target = hidden[at], mx.array(rows.target[at])[:, None]
        logits = backbone.head(states[None]).squeeze(0).astype(mx.float32)
        own = mx.take_along_axis(logits, target, axis=-1)[:, 0]
        losses.append(np.array(mx.logsumexp(logits, axis=-1) - own))
        ids = top_candidates(logits, states, NUM_CANDIDATES).ids
        places.append(_place(ids, target))
        if conditioner is None:
            continue
        parents, before = (
            backbone.embedding_rows(mx.array(ids[at])) for ids in (rows.parent, rows.grandparent)
        )
        delta = conditioner.correction(parents, states, before)
        candidates = backbone.head_rows(ids.reshape(-1)).reshape(*ids.shape, -1)
        gain = (candidates @ delta[..., None])[..., 0].astype(mx.float32)
        order = mx.argsort(-(mx.take_along_axis(logits, ids, axis=-1) + gain), axis=-1)
        corrected.append(_place(mx.take_along_axis(ids, order, axis=-1), target))

    shape = (num_positions, num_streams)
    return Ranks.of(rows.index, shape, places, corrected, losses)


def _place(candidates: mx.array, target: mx.array) -> np.ndarray:
    """Return where `target` (R, 1) stands in `candidates` (R, C), or NUM_CANDIDATES."""
    hit = candidates == target
    place = mx.where(mx.any(hit, axis=-1), mx.argmax(hit, axis=-1), NUM_CANDIDATES)
    return np.array(place)
