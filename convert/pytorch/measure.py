"""Where the true token stands among each stream's candidates (`mlx_specstream.train.figures`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...train.figures import NUM_CANDIDATES, Ranks
from .data import Targets
from .packed import PackedStreams

ROWS = 512
"""Rows whose logits over the whole vocabulary exist at the same time."""


def rank_targets(packed: PackedStreams, hidden: Tensor, wanted: Targets) -> Ranks:
    """Rank the true tokens for normed stream states (N, γ, h)."""
    N, G, _ = hidden.shape
    head, conditioner = packed.backbone.head_weight, packed.adapters.conditioner
    rows, tokens = hidden.flatten(0, 1), wanted.tokens.flatten()
    marginal, conditioned, losses = [], [], []
    for start in range(0, N * G, ROWS):
        part, token = rows[start : start + ROWS], tokens[start : start + ROWS, None]
        logits = (part @ head.t()).float()
        losses.append(logits.logsumexp(-1) - logits.gather(1, token)[:, 0])
        best = logits.topk(NUM_CANDIDATES, dim=-1)
        marginal.append(_place(best.indices, token))
        if conditioner is not None:
            parents, before = (
                packed.backbone.embed(ids.flatten()[start : start + ROWS])
                for ids in (wanted.parents, wanted.grandparents)
            )
            change = conditioner(parents, part, before) - part
            gain = torch.einsum("rch,rh->rc", head[best.indices].float(), change.float())
            order = (best.values + gain).argsort(-1, descending=True)
            conditioned.append(_place(best.indices.gather(1, order), token))
    valid = wanted.valid

    def table(parts: list[Tensor], empty: float) -> np.ndarray:
        return torch.cat(parts).view(N, G).masked_fill(~valid, empty).float().numpy()

    return Ranks(
        table(marginal, NUM_CANDIDATES),
        table(conditioned, NUM_CANDIDATES) if conditioned else None,
        table(losses, 0.0),
        valid.numpy(),
    )


def _place(candidates: Tensor, token: Tensor) -> Tensor:
    """Return where `token` (R, 1) stands in `candidates` (R, C), or NUM_CANDIDATES."""
    hit = candidates == token
    return torch.where(hit.any(-1), hit.int().argmax(-1), NUM_CANDIDATES)
