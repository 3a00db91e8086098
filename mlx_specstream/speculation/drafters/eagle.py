"""EAGLE: a layer that continues the base's features, given the token that was drawn after them.

    EAGLE-1, -2   fc [E(x_{p+1}) ; f_p] ──► layer ──► f̂_{p+1} ──► the base's LM head ──► x_{p+2}
    EAGLE-3       fc [a_p ; b_p ; c_p] = g_p;  layer of [norm E(x_{p+1}) ; norm g_p], added to g_p
                  ──► ĝ_{p+1} ──► norm ──► its own LM head over a smaller vocabulary ──► x_{p+2}

f is the state after the base's final norm; a, b, c are what goes into a low, a middle and a high
layer. Of drafts the features are the network's own. After Li et al., 2024 and 2025. EAGLE-2 is
EAGLE-1 drafting the tree that its probabilities ask for, as every drafter here does.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from ...config import DrafterConfig
from ...model.backbone import Backbone
from ...model.cache import KVCache, LayerView
from .drafter import Verified
from .layer import DraftLayer, with_weights
from .own_rows import RowPlace
from .unrolled import UnrolledDrafter


class Eagle(nn.Module):
    """EAGLE's network: `fc`, one layer, and with EAGLE-3 a norm and a head."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        assert config.layer is not None
        width = config.layer.hidden_size
        self.third = config.kind == "eagle3"
        inputs = config.num_features if self.third else 2 * width
        self.fc = nn.Linear(inputs, width, bias=config.bias)
        if not self.third:
            self.layer = DraftLayer(config.layer, width)
            return
        self.layer = DraftLayer(config.layer, 2 * width, ("input_layernorm", "hidden_norm"))
        self.norm = nn.RMSNorm(width, config.layer.rms_norm_eps)
        if config.own_head:
            self.head = nn.Linear(width, config.draft_vocab_size, bias=False)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)

    def __call__(
        self, rows: mx.array, features: mx.array, mask: mx.array | None, cache: LayerView
    ) -> mx.array:
        """Return states (1, R, h) for the tokens' embedding rows and features, both (1, R, h).

        cache: the layer's, during this pass. EAGLE-3's features are those `fc` has joined.
        """
        if not self.third:
            joined = self.fc(mx.concatenate([rows, features], axis=-1))
            return self.layer(joined, joined, mask, cache)
        norms = [self.layer.input_layernorm(rows), self.layer.hidden_norm(features)]
        return self.layer(features, mx.concatenate(norms, axis=-1), mask, cache)


class EagleDrafter(UnrolledDrafter):
    """EAGLE's layer as a drafter."""

    needs_next = True

    def __init__(
        self,
        backbone: Backbone,
        config: DrafterConfig,
        tensors: Mapping[str, mx.array],
    ) -> None:
        self.backbone, self.depth, self.config = backbone, config.num_levels, config
        # A layer's input is the output of the layer below; of layer 0, the embeddings.
        self.taps = tuple(sorted({number - 1 for number in config.feature_layers} - {-1}))
        self.ids = tensors.get("d2t")
        self.net = Eagle(config)
        floats = {name: tensor for name, tensor in tensors.items() if name != "d2t"}
        with_weights(self.net, floats, backbone.dtype)

    def new_rows(self) -> KVCache:
        """Return an empty cache of one layer."""
        return KVCache(1)

    def features(self, verified: Verified) -> mx.array:
        """Return the base's last states, or those of three layers joined by `fc`."""
        if self.config.kind == "eagle":
            return verified.last
        tapped = dict(zip(self.taps, verified.taps, strict=True))
        inputs = [
            tapped[number - 1] if number else self.backbone.embed(verified.tree.tokens)
            for number in self.config.feature_layers
        ]
        joined: mx.array = self.net.fc(mx.concatenate(inputs, axis=-1))
        return joined

    def read_rows(self, tokens: mx.array, features: mx.array | None, place: RowPlace) -> mx.array:
        """Run the layer over rows (R), each a token with the features before it."""
        assert features is not None
        embed = self.net.embed_tokens if self.config.own_embedding else self.backbone.embedding_rows
        rows = embed(tokens)[None]
        view = place.kv.view(0, place.start, place.positions)
        return self.net(rows, features, place.mask.as_array(), view)

    def logits(self, states: mx.array) -> mx.array:
        """Return logits (R, V') of states (1, R, h): the base's head, or EAGLE-3's own."""
        if not self.net.third:
            return self.backbone.head(states).squeeze(0)
        normed = self.net.norm(states)
        head = self.net.head if self.config.own_head else self.backbone.head
        found: mx.array = head(normed).squeeze(0)
        return found

    def token_ids(self, ids: mx.array) -> mx.array:
        """Return the base's token ids for columns of `logits`."""
        return ids if self.ids is None else mx.take(self.ids, ids)
