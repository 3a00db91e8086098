"""Streams with random weights for any model, and drafts that are often right without training.

Exactness must not depend on what the streams have learned, so tests decode with random ones.
Those are almost never right in a large vocabulary, and a decoder whose drafts are never accepted
tests little. Two ways out: a vocabulary of a dozen tokens, where guesses hit now and then, and
`with_table`, whose drafts come from a table "after token a, the model alone says b".
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn

from mlx_specstream.config import StreamConfig
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.speculation.drafters import StreamDrafter
from mlx_specstream.speculation.drafting import StreamDecoder
from mlx_specstream.speculation.tree import Proposer

_LINEAR = (nn.Linear, nn.QuantizedLinear)


def linear_modules(backbone: Backbone, first_msa: int) -> tuple[str, ...]:
    """Return the paths of linear layers that all layers from `first_msa` on have."""
    common: set[str] | None = None
    for layer in backbone.layers[first_msa:]:
        own = {
            path
            for path, module in layer.named_modules()
            if isinstance(module, _LINEAR) and not any(part.isdigit() for part in path.split("."))
        }
        common = own if common is None else common & own
    return tuple(sorted(common or ()))


def random_tensors(
    backbone: Backbone,
    config: StreamConfig,
    seed: int = 0,
    scale: float = 0.5,
    gates: bool = False,
) -> dict[str, mx.array]:
    """Return stream weights of the config's shapes; `scale` is the size of what they add.

    `gates`: with gates on main's attention to its streams, which only shared mode has.
    """
    keys = iter(mx.random.split(mx.random.key(seed), 1000))
    h, G = backbone.hidden_size, config.num_streams

    def pair(name: str, inputs: int, outputs: int, rank: int) -> dict[str, mx.array]:
        a = mx.random.normal((inputs, rank), key=next(keys)) / inputs**0.5
        b = mx.random.normal((rank, outputs), key=next(keys)) * scale / rank**0.5
        return {f"{name}.lora_a": a, f"{name}.lora_b": b}

    tensors = {"stream_embeddings": scale * mx.random.normal((G, h), key=next(keys))}
    if config.stream_init_rank:
        tensors |= pair("stream_init", h, h, config.stream_init_rank)
    first = 0 if config.mode == "shared" else backbone.num_layers - config.num_msa_layers
    for index in range(first, backbone.num_layers):
        for path in config.target_modules:
            module = backbone.layers[index]
            for part in path.split("."):
                module = module[part]
            inputs, outputs = _linear_shape(module)
            tensors |= pair(f"layers.{index}.{path}", inputs, outputs, config.lora_rank)
    if gates:
        for index in range(backbone.num_layers - config.num_msa_layers, backbone.num_layers):
            heads = backbone.model.args.num_attention_heads
            tensors[f"layers.{index}.stream_gate"] = mx.random.normal((heads,), key=next(keys))
    if config.next_token_rank:
        tensors |= pair("next_token", h, h, config.next_token_rank)
    if config.pruner_rank:
        tensors |= pair("pruner", h, h, config.pruner_rank)
    if config.conditioner_rank:
        m = config.conditioner_hidden
        seen = (1 + config.conditioner_tokens) * h
        tensors["conditioner.mlp_in"] = mx.random.normal((m, seen), key=next(keys)) / h**0.5
        tensors["conditioner.mlp_out"] = mx.random.normal((h, m), key=next(keys)) * scale / m**0.5
        tensors |= pair("conditioner", h, h, config.conditioner_rank)
    return tensors


def _linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear layer, quantised or not."""
    rows, columns = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        columns = linear.scales.shape[-1] * linear.group_size
    return columns, rows


class TableDrafter(StreamDrafter):
    """Proposes, after any token, what the model says after that token alone.

    ids (V, branching) int32 and log_probs, best first. The streams are computed all the same.
    """

    ids: mx.array
    log_probs: mx.array

    def candidates(self, stream_states: mx.array, branching: int) -> Proposer:
        del branching
        nothing = 0.0 * mx.isnan(mx.sum(stream_states))

        def propose(
            level: int, parents: mx.array, grandparents: mx.array, places: mx.array
        ) -> tuple[mx.array, mx.array]:
            del level, grandparents, places
            log_probs = mx.take(self.log_probs, parents, axis=0) + nothing
            return mx.take(self.ids, parents, axis=0), log_probs

        return propose


def with_table(decoder: StreamDecoder) -> StreamDecoder:
    """Let a decoder's drafts come from the model's own one-token contexts."""
    backbone = decoder.streams.backbone
    names = [f.name for f in dataclasses.fields(StreamDrafter)]
    drafter = TableDrafter(**{name: getattr(decoder.drafter, name) for name in names})
    logits = backbone.model(mx.arange(backbone.vocab_size)[:, None])[:, -1]
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.argsort(-log_probs, axis=-1)[:, : max(decoder.config.tree.branching, 1)].astype(
        mx.int32
    )
    drafter.ids, drafter.log_probs = ids, mx.take_along_axis(log_probs, ids, axis=-1)
    mx.eval(drafter.ids, drafter.log_probs)
    decoder.stepper = dataclasses.replace(decoder.stepper, drafter=drafter)
    return decoder
