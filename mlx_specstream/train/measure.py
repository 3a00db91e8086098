"""How good drafts are, teacher-forced over held-out texts, with the whole vocabulary.

A stream hits when the text's token is its best candidate (top-1), or among its best two or three.
In a chain the parents of accepted drafts are the text's own tokens, so conditioning on the true
parent is exactly what decoding does; re-ranking is limited to the candidates decoding looks at.

    expected chain tokens per step = 1 + mean over positions of the drafts accepted in a row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone
from ..speculation.condition import NUM_CANDIDATES, Conditioner, top_candidates
from .targets import Rows

CHUNK = 256


@dataclass(frozen=True)
class Ranks:
    """Where the true token stands among each stream's candidates, 0 first; (N, γ) on the host.

    marginal, conditioned: at most NUM_CANDIDATES, which also stands for a row without a target.
    loss: cross-entropy of each row, zero where there is no target. valid: (N, γ) bool.
    """

    marginal: np.ndarray
    conditioned: np.ndarray | None
    loss: np.ndarray
    valid: np.ndarray


def rank(
    hidden: mx.array,
    rows: Rows,
    num_positions: int,
    num_streams: int,
    backbone: Backbone,
    conditioner: Conditioner | None,
) -> Ranks:
    """Rank the targets of a pass, hidden (R, h) being the states of `rows`."""
    places, corrected, losses = [], [], []
    for start in range(0, len(rows.index), CHUNK):
        at = slice(start, start + CHUNK)
        states, target = hidden[at], mx.array(rows.target[at])[:, None]
        logits = backbone.head(states[None])[0].astype(mx.float32)
        own = mx.take_along_axis(logits, target, axis=-1)[:, 0]
        losses.append(np.array(mx.logsumexp(logits, axis=-1) - own))
        ids = top_candidates(logits, states, NUM_CANDIDATES).ids
        places.append(_place(ids, target))
        if conditioner is None:
            continue
        parents = backbone.embedding_rows(mx.array(rows.parent[at]))
        delta = conditioner.correction(parents, states)
        candidates = backbone.head_rows(ids.reshape(-1)).reshape(*ids.shape, -1)
        gain = (candidates @ delta[..., None])[..., 0].astype(mx.float32)
        order = mx.argsort(-(mx.take_along_axis(logits, ids, axis=-1) + gain), axis=-1)
        corrected.append(_place(mx.take_along_axis(ids, order, axis=-1), target))

    def spread(parts: list[np.ndarray], empty: float) -> np.ndarray:
        table = np.full(num_positions * num_streams, empty, dtype=np.float32)
        table[rows.index] = np.concatenate(parts)
        return table.reshape(num_positions, num_streams)

    valid = np.zeros(num_positions * num_streams, dtype=bool)
    valid[rows.index] = True
    return Ranks(
        spread(places, NUM_CANDIDATES),
        spread(corrected, NUM_CANDIDATES) if corrected else None,
        spread(losses, 0.0),
        valid.reshape(num_positions, num_streams),
    )


def _place(candidates: mx.array, target: mx.array) -> np.ndarray:
    """Return where `target` (R, 1) stands in `candidates` (R, C), or NUM_CANDIDATES."""
    hit = candidates == target
    place = mx.where(mx.any(hit, axis=-1), mx.argmax(hit, axis=-1), NUM_CANDIDATES)
    return np.array(place)


def chain_lengths(ranks: np.ndarray) -> np.ndarray:
    """Return how many drafts of a chain are accepted at each position, (N,)."""
    hits: np.ndarray = np.cumprod(ranks == 0, axis=-1).sum(-1)
    return hits


def summarize(parts: Sequence[Ranks]) -> dict[str, object]:
    """Return figures over all positions: loss, top-1/2/3 per stream, chain tokens per step."""
    valid = np.concatenate([part.valid for part in parts])
    counts = np.maximum(valid.sum(0), 1)
    loss = np.concatenate([part.loss for part in parts]).sum(0) / counts
    figures: dict[str, object] = {
        "positions": int(valid[:, 0].sum()),
        "loss": [round(float(v), 4) for v in loss],
    }
    for name in ("marginal", "conditioned"):
        tables = [getattr(part, name) for part in parts]
        if any(table is None for table in tables):
            continue
        ranks = np.concatenate(tables)
        for k in (1, 2, 3):
            share = ((ranks < k) & valid).sum(0) / counts
            figures[f"{name}_top{k}"] = [round(float(v), 4) for v in share]
        real = valid[:, 0]  # what only fills up a segment has no target at all
        figures[f"{name}_chain"] = round(1 + float(chain_lengths(ranks)[real].mean()), 4)
    return figures
