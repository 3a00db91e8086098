"""Does speculation with random streams give mlx-lm's own tokens? Tried on one model.

Random streams in a tiny vocabulary are right now and then, so drafts are accepted and rejected at
every depth. The reference is mlx-lm's `generate_step` with mlx-lm's own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from mlx_specstream.config import DecodeConfig, PruneSpec, StreamConfig, TreeSpec
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.probe import check_backbone
from mlx_specstream.speculation.drafting import StreamDecoder
from mlx_specstream.speculation.result import MaxTokens
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.weights.fingerprint import base_dims
from mlx_specstream.weights.stream_tensors import stream_shapes

TIE = 1e-3  # logits are around 1 to 10, float32 noise of a tiny model 1e-5
NUM_STREAMS, NUM_MSA_LAYERS = 3, 2


@dataclass(frozen=True)
class Tried:
    """What a comparison found. `differs` says where and how, None if nowhere."""

    tokens: int
    accepted: int
    differs: str | None


def random_streams(backbone: Backbone, seed: int = 0, scale: float = 0.5) -> Streams:
    """Return random streams with every part, on all linear modules of the MSA layers."""
    config = StreamConfig(
        num_streams=NUM_STREAMS,
        num_msa_layers=NUM_MSA_LAYERS,
        lora_rank=4,
        target_modules=base_dims(backbone.model).common_modules(NUM_MSA_LAYERS),
        pruner_rank=2,
        conditioner_rank=3,
        conditioner_hidden=5,
    )
    shapes = stream_shapes(config, base_dims(backbone.model))
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    tensors = {
        name: mx.random.normal(shape, key=key) * scale / (shape[0] ** 0.5 if "." in name else 1)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    return Streams(backbone, config, tensors)


def decode_configs(is_chain: bool) -> list[DecodeConfig]:
    """Return the ways of decoding that are tried: chain and tree, both schedules, pruned.

    is_chain: chains only, deferred, and one of them shorter.
    """
    chain = TreeSpec(kind="chain", branching=1, depth=NUM_STREAMS)
    tree = replace(chain, depth=2) if is_chain else TreeSpec(kind="best", rows=10)
    return [
        DecodeConfig(chain, schedule="deferred"),
        DecodeConfig(tree, schedule="deferred" if is_chain else "inline"),
        DecodeConfig(tree, prune=PruneSpec(keep=3 if is_chain else 6), schedule="deferred"),
    ]


def decoded(
    streams: Streams, config: DecodeConfig, prompt: Sequence[int], max_tokens: int
) -> tuple[list[int], int]:
    """Return the greedy tokens of a prompt, at least `max_tokens`, and how many were drafts."""
    decoder, cache = StreamDecoder(streams, config, TokenSampler()), streams.backbone.new_cache()
    decoder.prefill(prompt[:-1], cache)
    results = list(decoder.steps(prompt[-1], cache, MaxTokens(max_tokens)))
    tokens = [token for result in results for token in result.tokens]
    return tokens, sum(result.accepted for result in results)


def compare_with_mlx_lm(
    model: nn.Module, prompt: Sequence[int], max_tokens: int, seed: int = 0
) -> Tried:
    """Decode `prompt` both ways with random streams and compare every token.

    Raises:
        ModelError: the model is refused.
    """
    backbone = Backbone(model)
    check_backbone(backbone)
    streams = random_streams(backbone, seed)
    steps = generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens)
    expected, gaps = [], []
    for token, log_probs in steps:
        best = mx.sort(log_probs)[-2:]
        expected.append(int(token))
        gaps.append(cast(float, (best[1] - best[0]).item()))
    accepted = 0
    for config in decode_configs(backbone.is_recurrent):
        found, hits = decoded(streams, config, prompt, max_tokens)
        accepted += hits
        for place, (token, wanted) in enumerate(zip(found, expected, strict=False)):
            if token != wanted and gaps[place] < TIE:
                break
            if token != wanted:
                return Tried(
                    max_tokens,
                    accepted,
                    f"token {place} is {token}, in mlx-lm {wanted} (gap {gaps[place]:.2g}), "
                    f"tree {config.tree}, {config.schedule}",
                )
    return Tried(max_tokens, accepted, None)
