"""Medusa-1: heads on the last state, each a guess at a token further on that knows no other.

    h at t ──┬── LM head ──► x_{t+1}        h: the base's state after its final norm
             ├── head 0  ──► x_{t+2}        head i: x + silu(W x + b), some blocks of it, then
             └── head 1  ──► x_{t+3}           an LM head, its own or the base's

After Cai et al., 2024. Candidates are the same for every parent, as the paper's streams are.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from ...config import DrafterConfig, TreeSpec
from ...model.backbone import Backbone
from ...model.cache import KVCache
from ..accept import AcceptedPath
from ..condition import MarginalProposer, top_candidates
from ..tree import Proposer
from .drafter import Drafter, Verified
from .layer import with_weights


class MedusaHead(nn.Module):
    """Residual blocks, and an LM head if it has one of its own."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.blocks = [nn.Linear(h, h) for _ in range(config.num_blocks)]
        if config.own_head:
            self.head = nn.Linear(h, config.vocab_size, bias=config.bias)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the state (..., h) that an LM head reads."""
        for block in self.blocks:
            x = x + nn.silu(block(x))
        return x


class Medusa(nn.Module):
    """All heads, as they are trained and saved."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.heads = [MedusaHead(config) for _ in range(config.num_heads)]
        self.own_head = config.own_head

    def __call__(self, states: mx.array, backbone: Backbone) -> mx.array:
        """Return logits (heads, R, V) of final normed states (R, h)."""
        after = [head(states) for head in self.heads]
        if not self.own_head:
            return backbone.head(mx.stack(after))
        own = [head.head(state) for head, state in zip(self.heads, after, strict=True)]
        return mx.stack(own)


class MedusaDrafter(Drafter):
    """Medusa's heads as a drafter."""

    def __init__(
        self, backbone: Backbone, config: DrafterConfig, tensors: Mapping[str, mx.array]
    ) -> None:
        self.backbone, self.depth = backbone, config.num_heads
        self.net = Medusa(config)
        with_weights(self.net, tensors, backbone.dtype)

    def propose(
        self, verified: Verified, path: AcceptedPath, cache: KVCache, spec: TreeSpec
    ) -> Proposer:
        """Return each head's best candidates at the accepted node."""
        del cache
        state = mx.take(verified.last[0], path.node.reshape(1), axis=0)
        logits = self.net(state, self.backbone)[:, 0]
        return MarginalProposer(top_candidates(logits, state, spec.branching))
