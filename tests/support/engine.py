"""Random streams for tiny models, decoding with them, and proposals that are often right.

Random streams are almost never right in a large vocabulary, and a decoder whose drafts are never
accepted tests little. Two ways out: a vocabulary of a dozen tokens, where guesses hit now and
then, and `table_decoder`, whose drafts come from a table "after token a, the model alone says b".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import settings
from mlx_lm.generate import generate_step

from mlx_specstream.config import DecodeConfig, StreamConfig
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.planner.adaptive import AutoDecoder
from mlx_specstream.speculation.drafting import DraftDecoder, StreamDecoder
from mlx_specstream.speculation.plain import PlainDecoder, plain_decoder
from mlx_specstream.speculation.result import MaxTokens, StepResult
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from tests.support import tiny
from tests.support.random_streams import random_tensors, with_table

ALL_MODULES = tuple(
    [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
)
TIE_GAP = 1e-3  # of logits around 1 to 10; float32 noise of a 6-layer model is 1e-5


def examples(number: int) -> settings:
    """Return settings for `number` examples in the default profile, more in `explore`."""
    return settings(max_examples=max(1, number * settings.default.max_examples // 100))


@lru_cache(maxsize=64)
def small_model(
    family: str = "llama",
    layers: int = 3,
    vocab: int = 12,
    seed: int = 0,
    attention: float = 1.0,
    window: int | None = None,
    **overrides: Any,
) -> nn.Module:
    """Return a model of width 32.

    `attention` scales what its attention layers add. With a `window` every other layer slides.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "head_dim": 8,
    }
    if family == "qwen2":
        del sizes["head_dim"]
    if window is not None:
        types = ["full_attention", "sliding_attention"] * layers
        sizes |= {"sliding_window": window, "layer_types": types[:layers]}
    model = tiny.tiny_model(family, seed=seed, **{**sizes, **overrides})
    for layer in model.layers:
        out = layer.self_attn.o_proj
        out.weight = out.weight * attention
    mx.eval(model.parameters())
    return model


def stream_config(**fields: Any) -> StreamConfig:
    """Return a config with every part: adapters on all modules, init map, pruner, conditioner."""
    defaults: dict[str, Any] = {
        "num_streams": 3,
        "num_msa_layers": 2,
        "stream_init_rank": 3,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "target_modules": ALL_MODULES,
        "pruner_rank": 2,
        "conditioner_rank": 3,
        "conditioner_hidden": 5,
    }
    return StreamConfig(**{**defaults, **fields})


def random_streams(
    model: nn.Module, config: StreamConfig, seed: int = 0, scale: float = 0.5
) -> Streams:
    """Return random streams over `model`."""
    backbone = Backbone(model)
    return Streams(backbone, config, random_tensors(backbone, config, seed, scale))


def table_decoder(streams: Streams, config: DecodeConfig, **options: Any) -> StreamDecoder:
    """Return a decoder whose drafts come from the model's own one-token contexts."""
    return with_table(stream_decoder(streams, config, **options))


def stream_decoder(
    streams: Streams,
    config: DecodeConfig,
    token_sampler: TokenSampler | None = None,
    **options: Any,
) -> StreamDecoder:
    """Return a greedy decoder, if no `token_sampler` is given."""
    return StreamDecoder(streams, config, token_sampler or TokenSampler(), **options)


@dataclass
class Decoded:
    """What a run gave: tokens, its steps, and the committed rows after every step, if asked."""

    tokens: list[int]
    steps: list[StepResult]
    cache: KVCache
    snapshots: list[list[tuple[np.ndarray, np.ndarray]]]

    @property
    def accepted(self) -> int:
        return sum(step.accepted for step in self.steps)


def decode(
    decoder: DraftDecoder | PlainDecoder | AutoDecoder,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    cache: KVCache | None = None,
    snapshots: bool = False,
    chunk: int = 2048,
) -> Decoded:
    """Run `decoder` from `prompt` until it has emitted at least `max_tokens`."""
    backbone = decoder.drafter.backbone if isinstance(decoder, DraftDecoder) else decoder.backbone
    assert backbone is not None
    cache = cache or KVCache(backbone.num_layers)
    decoder.token_sampler.history[:] = prompt
    decoder.prefill(prompt[:-1], cache, chunk=chunk)
    run = Decoded([], [], cache, [])
    for result in decoder.steps(prompt[-1], cache, MaxTokens(max_tokens)):
        run.tokens += result.tokens
        run.steps.append(result)
        if snapshots:
            run.snapshots.append(committed_rows(cache))
    return run


def committed_rows(cache: KVCache) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return every layer's committed keys and values as NumPy arrays."""
    rows = [layer.read(cache.length) for layer in cache.layers]
    return [(np.array(k.astype(mx.float32)), np.array(v.astype(mx.float32))) for k, v in rows]


def plain(streams: Streams, prompt: Sequence[int], max_tokens: int, **options: Any) -> Decoded:
    """Return plain decoding of the model that `streams` belong to, one token per pass."""
    token_sampler = options.pop("token_sampler", None) or TokenSampler()
    return decode(
        plain_decoder(streams.backbone, streams, token_sampler), prompt, max_tokens, **options
    )


def mlx_lm_tokens(
    model: nn.Module, prompt: Sequence[int], max_tokens: int, **options: Any
) -> list[int]:
    """Return what mlx-lm's own `generate_step` gives (greedy unless a sampler is passed)."""
    steps: Iterable[tuple[int, mx.array]] = generate_step(
        mx.array(list(prompt)), model, max_tokens=max_tokens, **options
    )
    return [int(token) for token, _ in steps]


def assert_same_text(found: Sequence[int], expected: Decoded) -> None:
    """Fail unless `found` begins as `expected` does, but for a tie of the reference's top two."""
    for place, (token, wanted) in enumerate(zip(found, expected.tokens, strict=False)):
        if token != wanted:
            logits = np.sort(np.array(mx.concatenate([s.logits for s in expected.steps])[place]))
            gap = float(logits[-1] - logits[-2])
            assert gap < TIE_GAP, f"token {place}: {token}, plain {wanted} (gap {gap:.3g})"
            return


@cache
def is_compiling() -> bool:
    """Tell whether `mx.compile` traces functions: on the CPU it does where there is a C++ compiler."""
    try:
        mx.compile(lambda x: mx.zeros(int(x.item())))(mx.array(1))
    except ValueError:
        return True
    return False
