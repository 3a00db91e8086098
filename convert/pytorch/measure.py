"""Where the true token stands among each stream's candidates (`mlx_specstream.train.figures`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...train.figures import NUM_CANDIDATES, Ranks
from ...train.targets import TargetRows
from .packed import PackedStreams

ROWS = 512
"""Rows whose logits over the whole vocabulary exist at the same time."""


def rank_targets(packed: PackedStreams, streams: Tensor, rows: TargetRows) -> Ranks:
    """Rank the true tokens for normed stream states (N, γ, h)."""
    head, conditioner = packed.backbone.head_weight, packed.adapters.conditioner
    hidden = streams.flatten(0, 1)[torch.from_numpy(rows.index)]
    marginal, conditioned, losses = [], [], []
    for start in range(0, len(rows), ROWS):
        at = slice(start, start + ROWS)
        part, token = hidden[at], torch.from_numpy(rows.target[at]).long()[:, None]
        logits = (part @ head.t()).float()
        losses.append((logits.logsumexp(-1) - logits.gather(1, token)[:, 0]).numpy())
        best = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]), dim=-1)
        marginal.append(_place(best.indices, token))
        if conditioner is not None:
            parents, before = (
                packed.backbone.embed(torch.from_numpy(ids[at]))
                for ids in (rows.parent, rows.grandparent)
            )
            change = conditioner(parents, part, before) - part
            gain = torch.einsum("rch,rh->rc", head[best.indices].float(), change.float())
            order = (best.values + gain).argsort(-1, descending=True)
            conditioned.append(_place(best.indices.gather(1, order), token))
    shape = (streams.shape[0], streams.shape[1])
    return Ranks.of(rows.index, shape, marginal, conditioned, losses)


def _place(candidates: Tensor, token: Tensor) -> np.ndarray:
    """Return where `token` (R, 1) stands in `candidates` (R, C), or NUM_CANDIDATES."""
    hit = candidates == token
    return torch.where(hit.any(-1), hit.int().argmax(-1), NUM_CANDIDATES).numpy()
