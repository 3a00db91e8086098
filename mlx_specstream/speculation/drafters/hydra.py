"""Hydra: heads that know the tokens drafted before theirs.

    head 0  [h_t ; E(x_{t+1})]                 ──► x_{t+2}
    head 1  [h_t ; E(x_{t+1}) ; E(x_{t+2})]    ──► x_{t+3}     and so on

The first block of a head maps its input to the width h by a linear residual beside silu; further
blocks are Medusa's. h_t is the base's state after its final norm; Hydra++ first runs it through a
decoder layer of its own over the whole text. After Ankner et al., 2024.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from ...config import DrafterConfig, TreeSpec
from ...model.backbone import Backbone
from ...model.cache import KVCache
from ..accept import AcceptedPath
from ..condition import top_candidates
from ..tree import Proposer
from .drafter import Drafter, Verified
from .layer import DraftLayer, with_weights
from .own_rows import OwnRowsDrafter, RowPlace


class HydraHead(nn.Module):
    """Head i: its first block reads the state and i + 1 embeddings."""

    def __init__(self, config: DrafterConfig, index: int) -> None:
        super().__init__()
        h = config.hidden_size
        width = (index + 2) * h
        widths = [width, *[h] * (config.num_blocks - 1)]
        self.blocks = [nn.Linear(inputs, h) for inputs in widths]
        self.residual = nn.Linear(width, h)
        if config.own_head:
            self.head = nn.Linear(h, config.vocab_size, bias=config.bias)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the state (..., h) that an LM head reads, of inputs (..., (i + 2)·h)."""
        first, *others = self.blocks
        x = self.residual(x) + nn.silu(first(x))
        for block in others:
            x = x + nn.silu(block(x))
        return x


class Hydra(nn.Module):
    """All heads, and Hydra++'s layer with its norm."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.heads = [HydraHead(config, index) for index in range(config.num_heads)]
        self.own_head = config.own_head
        if config.layer is not None:
            self.prefix = DraftLayer(config.layer, config.hidden_size, ("input_layernorm",))
            self.norm = nn.RMSNorm(config.hidden_size, config.layer.rms_norm_eps)

    def logits(self, index: int, inputs: mx.array, backbone: Backbone) -> mx.array:
        """Return head `index`'s logits (R, V) of inputs (R, (i + 2)·h)."""
        head = self.heads[index]
        state = head(inputs)
        found: mx.array = (
            head.head(state) if self.own_head else backbone.head(state[None]).squeeze(0)
        )
        return found


class HydraDrafter(Drafter):
    """Hydra's heads as a drafter."""

    def __init__(
        self, backbone: Backbone, config: DrafterConfig, tensors: Mapping[str, mx.array]
    ) -> None:
        self.backbone, self.depth = backbone, config.num_heads
        self.net = Hydra(config)
        with_weights(self.net, tensors, backbone.dtype)

    def propose(
        self, verified: Verified, path: AcceptedPath, cache: KVCache, spec: TreeSpec
    ) -> Proposer:
        """Return what asks head after head, each with the tokens above it."""
        del cache
        state = mx.take(verified.last[0], path.node.reshape(1), axis=0)
        return HydraProposer(self.net, self.backbone, state, spec.branching)


class HydraPlusDrafter(OwnRowsDrafter, HydraDrafter):
    """Hydra++: the heads read what a layer of its own makes of the base's states."""

    def new_rows(self) -> KVCache:
        """Return an empty cache of one layer."""
        return KVCache(1)

    def features(self, verified: Verified) -> mx.array:
        """Return the base's states after the final norm."""
        return verified.last

    def read_rows(self, tokens: mx.array, features: mx.array | None, place: RowPlace) -> mx.array:
        """Run the layer over the base's states (1, R, h)."""
        del tokens
        assert features is not None
        rows = self.net.prefix.input_layernorm(features)
        view = place.kv.view(0, place.start, place.positions)
        hidden = self.net.prefix(features, rows, place.mask.as_array(), view)
        normed: mx.array = self.net.norm(hidden)
        return normed

    def propose(
        self, verified: Verified, path: AcceptedPath, cache: KVCache, spec: TreeSpec
    ) -> Proposer:
        """Read the accepted path and return what asks head after head below it."""
        states = self.read_path(verified, path, cache).states
        state = mx.take(states[0], path.length.reshape(1), axis=0)
        return HydraProposer(self.net, self.backbone, state, spec.branching)


class HydraProposer:
    """The candidates of a step: what a head reads grows by an embedding with every level.

    inputs: (1, h), the state at the accepted node.
    """

    def __init__(self, net: Hydra, backbone: Backbone, inputs: mx.array, branching: int) -> None:
        self.net, self.backbone, self.branching = net, backbone, branching
        self.state = self.inputs = inputs

    def __call__(
        self, level: int, parents: mx.array, before: mx.array, places: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return candidates (W, k) int32 and log-probabilities (W, k) float32."""
        del before
        above = mx.take(self.inputs if level else self.state, places, axis=0)
        rows = self.backbone.embedding_rows(parents)
        self.inputs = mx.concatenate([above, rows], axis=1)
        logits = self.net.logits(level, self.inputs, self.backbone)
        top = top_candidates(logits, self.inputs, self.branching)
        return top.ids, top.log_probs
