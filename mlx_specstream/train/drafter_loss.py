"""The losses of drafters that are not streams: what each head or layer is to predict, teacher-forced.

With f_p the base's state after its final norm at position p, level i predicts x_{p+2+i}:

    Medusa    head i of f_p
    Hydra     head i of [f_p ; E(x_{p+1}) ; ... ; E(x_{p+1+i})]; Hydra++ puts its layer before
    EAGLE     one level: the layer's f̂_{p+1}, which is also drawn to f_{p+1} (smooth L1)
    EAGLE-3   unrolled on its own outputs: at level i row p reads x_{p+1+i} and its own output of the
              level before, sees level 0's keys up to p and its own since: as decoding will

Loss: Σ_i α_i · mean cross-entropy of level i, α_i ∝ decay^i, under the base's own LM head, which
all of them share when trained here. EAGLE weighs it by 0.1 beside the regression, as published. The
texts are the base's own answers, so their tokens stand for its distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..config import DrafterConfig
from ..model.backbone import Backbone
from ..model.cache import KVCache, Span
from ..model.masks import causal_mask
from ..speculation.drafters.eagle import Eagle
from ..speculation.drafters.hydra import Hydra
from ..speculation.drafters.layer import DraftLayer
from ..speculation.drafters.medusa import Medusa
from .batches import Selection
from .head import Head, cross_entropy
from .loss import Tensors

UNROLLED = 5  # levels of EAGLE-3 that are trained
TOKEN_WEIGHT = 0.1  # of EAGLE's cross-entropy beside its regression
_CAUSE = -1e9


class BaseText(NamedTuple):
    """What the frozen base makes of one text, float32.

    last: (1, n, h), after the final norm. features: (1, n, 3h), what goes into EAGLE-3's three
    layers, else None. rows: (1, n, h), the tokens' embedding rows.
    """

    last: mx.array
    features: mx.array | None
    rows: mx.array


class Level(NamedTuple):
    """One level's states (R, h) of a text, and the positions (R,) they were made at."""

    states: mx.array
    positions: np.ndarray


@dataclass(frozen=True)
class DrafterObjective:
    """The frozen base, and one drafter's network to differentiate."""

    backbone: Backbone
    config: DrafterConfig
    decay: float = 0.8

    def network(self, tensors: Tensors) -> nn.Module:
        """Return the network with these weights."""
        kinds = {"medusa": Medusa, "hydra": Hydra, "eagle": Eagle, "eagle3": Eagle}
        net: nn.Module = kinds[self.config.kind](self.config)
        net.update(tree_unflatten(list(tensors.items())))
        return net

    def base(self, tokens: Sequence[int]) -> BaseText:
        """Run the base over a text."""
        backbone, n = self.backbone, len(tokens)
        ids = mx.array(list(tokens), dtype=mx.int32)
        cache, hidden = KVCache(backbone.num_layers), backbone.embed(ids)
        inputs, mask = {}, causal_mask(0, n)
        for number in range(backbone.num_layers):
            inputs[number] = hidden
            hidden = backbone.run(hidden, range(number, number + 1), cache, 0, 0, mask)
        chosen = [inputs[number] for number in self.config.feature_layers]
        features = mx.concatenate(chosen, axis=-1).astype(mx.float32) if chosen else None
        last = backbone.norm(hidden).astype(mx.float32)
        rows = backbone.embedding_rows(ids)[None].astype(mx.float32)
        mx.eval(last, rows, *([] if features is None else [features]))
        return BaseText(last, features, rows)

    def levels(self, net: nn.Module, base: BaseText, positions: np.ndarray) -> Iterator[Level]:
        """Yield each level's states of a text, what an LM head reads; positions: (P,), ascending."""
        n, config = base.last.shape[1], self.config
        if isinstance(net, Medusa | Hydra):
            states = base.last
            if config.layer is not None:
                assert isinstance(net, Hydra)
                rows = net.prefix.input_layernorm(states)
                states = net.norm(net.prefix(states, rows, _causal(n), _Whole()))
            for i, head in enumerate(net.heads):
                at = positions[positions + 2 + i < n]
                parts = [mx.take(states[0], mx.array(at), axis=0)]
                if isinstance(net, Hydra):
                    parts += [
                        mx.take(base.rows[0], mx.array(at + 1 + j), axis=0) for j in range(i + 1)
                    ]
                yield Level(head(mx.concatenate(parts, axis=-1)), at)
            return
        assert isinstance(net, Eagle)
        if config.kind == "eagle":
            hidden = net(base.rows[:, 1:], base.last[:, :-1], _causal(n - 1), _Whole())
            at = positions[positions + 2 < n]
            yield Level(mx.take(hidden[0], mx.array(at), axis=0), at)
            return
        assert base.features is not None
        hidden = net.fc(base.features)[:, :-1]
        keys: list[tuple[mx.array, mx.array]] = []
        for i in range(UNROLLED):
            # Rows that have run out of text read what is not theirs; none of them has a target.
            rows = mx.roll(base.rows, -(1 + i), 1)[:, :-1]
            both = mx.concatenate(
                [net.layer.input_layernorm(rows), net.layer.hidden_norm(hidden)], axis=-1
            )
            hidden = _unrolled(net.layer, hidden, both, keys)
            at = positions[positions + 2 + i < n]
            yield Level(net.norm(mx.take(hidden[0], mx.array(at), axis=0)), at)

    def loss(
        self, tensors: Tensors, batch: Sequence[Selection], bases: Sequence[BaseText], head: Head
    ) -> tuple[mx.array, list[mx.array]]:
        """Return the loss () and each level's cross-entropies (R_i,).

        bases: of the batch's texts, in order.
        """
        net = self.network(tensors)
        states: list[list[mx.array]] = []
        targets: list[list[np.ndarray]] = []
        regression: list[mx.array] = []
        for selection, base in zip(batch, bases, strict=True):
            tokens = np.array(selection.example.tokens)
            found = self.levels(net, base, np.array(selection.positions, dtype=np.int64))
            for i, level in enumerate(found):
                if i == len(states):
                    states.append([])
                    targets.append([])
                states[i].append(level.states)
                targets[i].append(tokens[level.positions + 2 + i])
                if self.config.kind == "eagle" and len(level.positions):
                    wanted = mx.take(base.last[0], mx.array(level.positions + 1), axis=0)
                    apart = nn.losses.smooth_l1_loss(level.states, wanted, reduction="none")
                    regression.append(apart.mean(axis=-1))
        alphas = self.decay ** np.arange(len(states))
        alphas /= alphas.sum()
        total, losses = mx.array(0.0), []
        for alpha, parts, wanted_tokens in zip(alphas, states, targets, strict=True):
            tokens = np.concatenate(wanted_tokens)
            if not len(tokens):
                losses.append(mx.zeros((0,)))
                continue
            rows = mx.concatenate(parts).astype(self.backbone.dtype)
            weights = np.full(len(tokens), alpha / len(tokens), np.float32)
            part, each = cross_entropy(rows, head, tokens, weights)
            total = total + (TOKEN_WEIGHT * part if regression else part)
            losses.append(each)
        if regression:
            total = total + mx.concatenate(regression).mean()
        return total, losses


class _Whole:
    """What a layer sees as its cache where a whole text is one pass: that text alone."""

    offset: int | mx.array = 0
    span: Span | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the pass's own rows."""
        return keys, values


def _causal(n: int) -> mx.array:
    return mx.tril(mx.ones((n, n), dtype=mx.bool_))


def _unrolled(
    layer: DraftLayer,
    residual: mx.array,
    rows: mx.array,
    keys: list[tuple[mx.array, mx.array]],
) -> mx.array:
    """Run a layer at the level after `keys`, whose own keys and values are added to them.

    residual: (1, n, h). rows: (1, n, 2h). A row sees the first level's rows up to its own, and of
    every later level its own row alone.
    """
    attention, level = layer.self_attn, len(keys)
    B, n, _ = rows.shape
    heads = lambda y, count: y.reshape(B, n, count, -1).transpose(0, 2, 1, 3)  # noqa: E731
    group = attention.num_heads // attention.num_kv_heads
    q = attention.rope(heads(attention.q_proj(rows), attention.num_heads), offset=level)
    k = attention.rope(heads(attention.k_proj(rows), attention.num_kv_heads), offset=level)
    v = heads(attention.v_proj(rows), attention.num_kv_heads)
    keys.append((mx.repeat(k, group, axis=1), mx.repeat(v, group, axis=1)))
    q = q * attention.head_dim**-0.5
    (first, values), later = keys[0], keys[1:]
    scores = mx.where(_causal(n), q @ first.transpose(0, 1, 3, 2), _CAUSE)
    own = [(q * key).sum(axis=-1, keepdims=True) for key, _ in later]
    weights = mx.softmax(mx.concatenate([scores, *own], axis=-1), axis=-1, precise=True)
    out = weights[..., :n] @ values
    for place, (_, value) in enumerate(later):
        out = out + weights[..., n + place : n + place + 1] * value
    joined = attention.o_proj(out.transpose(0, 2, 1, 3).reshape(B, n, -1))
    hidden = residual + joined
    added: mx.array = layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden + added
