"""Random streams for tiny models, decoding with them, and proposals that are often right.

Random streams are almost never right in a large vocabulary, and a decoder whose drafts are never
accepted tests little. Two ways out: a vocabulary of a dozen tokens, where guesses hit now and
then, and `table_decoder`, whose drafts come from a table "after token a, the model alone says b".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import settings
from mlx_lm.generate import generate_step

from mlx_specstream.backbone import Backbone
from mlx_specstream.baseline import PlainDecoder, plain_decoder
from mlx_specstream.cache import KVCache
from mlx_specstream.config import DecodeConfig, StreamConfig
from mlx_specstream.decode import StreamDecoder
from mlx_specstream.result import StepResult
from mlx_specstream.sampling import TokenChooser
from mlx_specstream.step import Stepper
from mlx_specstream.streams import Streams
from mlx_specstream.tree import Proposer
from tests import tiny

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


def _linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear layer, quantised or not."""
    rows, columns = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        columns = linear.scales.shape[-1] * linear.group_size
    return columns, rows


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
            part, leaf = path.split(".")
            inputs, outputs = _linear_shape(backbone.model.layers[index][part][leaf])
            tensors |= pair(f"layers.{index}.{path}", inputs, outputs, config.lora_rank)
    if gates:
        for index in range(backbone.num_layers - config.num_msa_layers, backbone.num_layers):
            heads = backbone.model.args.num_attention_heads
            tensors[f"layers.{index}.stream_gate"] = mx.random.normal((heads,), key=next(keys))
    if config.pruner_rank:
        tensors |= pair("pruner", h, h, config.pruner_rank)
    if config.conditioner_rank:
        m = config.conditioner_hidden
        tensors["conditioner.mlp_in"] = mx.random.normal((m, 2 * h), key=next(keys)) / h**0.5
        tensors["conditioner.mlp_out"] = mx.random.normal((h, m), key=next(keys)) * scale / m**0.5
        tensors |= pair("conditioner", h, h, config.conditioner_rank)
    return tensors


def random_streams(
    model: nn.Module, config: StreamConfig, seed: int = 0, scale: float = 0.5
) -> Streams:
    """Return random streams over `model`."""
    backbone = Backbone(model)
    return Streams(backbone, config, random_tensors(backbone, config, seed, scale))


class TableStepper(Stepper):
    """Proposes, after any token, what the model says after that token alone."""

    ids: mx.array
    log_probs: mx.array

    def candidates(self, stream_states: mx.array) -> Proposer:
        del stream_states

        def propose(level: int, parents: mx.array) -> tuple[mx.array, mx.array]:
            del level
            return mx.take(self.ids, parents, axis=0), mx.take(self.log_probs, parents, axis=0)

        return propose


def table_decoder(streams: Streams, config: DecodeConfig, **options: Any) -> StreamDecoder:
    """Return a decoder whose drafts come from the model's own one-token contexts."""
    decoder = stream_decoder(streams, config, **options)
    fields = {f.name: getattr(decoder.stepper, f.name) for f in dataclasses.fields(Stepper)}
    stepper = TableStepper(**fields)
    logits = streams.backbone.model(mx.arange(streams.backbone.vocab_size)[:, None])[:, -1]
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.argsort(-log_probs, axis=-1)[:, : max(config.tree.branching, 1)].astype(mx.int32)
    object.__setattr__(stepper, "ids", ids)
    object.__setattr__(stepper, "log_probs", mx.take_along_axis(log_probs, ids, axis=-1))
    mx.eval(stepper.ids, stepper.log_probs)
    decoder.stepper = stepper
    return decoder


def stream_decoder(
    streams: Streams, config: DecodeConfig, chooser: TokenChooser | None = None, **options: Any
) -> StreamDecoder:
    """Return a greedy decoder, if no `chooser` is given."""
    return StreamDecoder(streams, config, chooser or TokenChooser(), **options)


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
    decoder: StreamDecoder | PlainDecoder,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    cache: KVCache | None = None,
    snapshots: bool = False,
    chunk: int = 2048,
) -> Decoded:
    """Run `decoder` from `prompt` until it has emitted at least `max_tokens`."""
    backbone = decoder.backbone if isinstance(decoder, PlainDecoder) else decoder.streams.backbone
    cache = cache or KVCache(backbone.num_layers)
    decoder.chooser.history[:] = prompt
    decoder.prefill(prompt[:-1], cache, chunk=chunk)
    run = Decoded([], [], cache, [])
    emitted = 0

    def more(result: StepResult) -> bool:
        nonlocal emitted
        emitted += len(result.tokens)
        return emitted < max_tokens

    for result in decoder.steps(prompt[-1], cache, more):
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
    chooser = options.pop("chooser", None) or TokenChooser()
    return decode(plain_decoder(streams.backbone, streams, chooser), prompt, max_tokens, **options)


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
