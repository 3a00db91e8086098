"""How good drafts are, teacher-forced over the model's own text, with the whole vocabulary.

A stream hits when its best token is the text's. In a chain the drafts' parents are the accepted tokens themselves, so
conditioning on the true parent is exactly what decoding would do; re-ranking is limited to each stream's
`NUM_CANDIDATES` best, as at decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .condition import NUM_CANDIDATES
from .data import Targets
from .packed import PackedStreams

ROWS = 512
"""Rows whose logits over the whole vocabulary exist at the same time."""


@dataclass(frozen=True)
class Ranks:
    """Place of the true token among each stream's candidates, 0 = best; (N, γ) int64.

    marginal: capped at NUM_CANDIDATES. conditioned: the same after re-ranking, or None without a conditioner.
    valid: (N, γ) bool. loss: cross-entropy summed per stream, (γ,).
    """

    marginal: Tensor
    conditioned: Tensor | None
    valid: Tensor
    loss: Tensor


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
    loss = (torch.cat(losses).view(N, G) * wanted.valid).sum(0)
    reranked = torch.cat(conditioned).view(N, G) if conditioned else None
    return Ranks(torch.cat(marginal).view(N, G), reranked, wanted.valid, loss)


def _place(candidates: Tensor, token: Tensor) -> Tensor:
    """Return where `token` (R, 1) stands in `candidates` (R, C), or C."""
    hit = candidates == token
    return torch.where(hit.any(-1), hit.int().argmax(-1), candidates.shape[1])


def chain_lengths(ranks: Tensor, valid: Tensor) -> Tensor:
    """Return how many drafts of a chain the target accepts at each position, (N,)."""
    return ((ranks == 0) & valid).cumprod(-1).sum(-1)


def walk(accepted: Tensor) -> list[int]:
    """Return the accepted drafts of every step when one text (positions in order) is decoded with a chain.

    A step at position t emits accepted[t] + 1 tokens and the next one starts that much further on.
    """
    steps, t = [], 0
    while t < len(accepted):
        steps.append(int(accepted[t]))
        t += steps[-1] + 1
    return steps


def summarize(ranks: Sequence[Ranks]) -> dict[str, object]:
    """Return figures over all positions: losses, top-1/2/3 per stream, expected chain tokens per step."""
    valid = torch.cat([r.valid for r in ranks])
    count = valid.sum(0).clamp(min=1)
    figures: dict[str, object] = {
        "positions": len(valid),
        "loss": _rounded(sum(r.loss for r in ranks) / count),
    }
    for name in ("marginal", "conditioned"):
        parts = [getattr(r, name) for r in ranks]
        if parts[0] is None:
            continue
        places = torch.cat(parts)
        for k in (1, 2, 3):
            figures[f"{name}_top{k}"] = _rounded(((places < k) & valid).sum(0) / count)
        figures[f"{name}_chain"] = round(float(chain_lengths(places, valid).float().mean()) + 1, 4)
    return figures


def _rounded(values: Tensor) -> list[float]:
    return [round(float(v), 4) for v in values]
