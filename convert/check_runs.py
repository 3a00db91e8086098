"""The proof's runs in MLX: greedy answers to the probes, and what was computed on the way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import DecodeConfig, TreeSpec
from ..model.backbone import Backbone
from ..model.cache import KVCache
from ..speculation.drafters import StreamDrafter
from ..speculation.drafting import StreamDecoder
from ..speculation.result import MaxTokens
from ..speculation.sampling import TokenSampler
from ..speculation.streams import Streams
from ..speculation.tree import root_only
from ..weights.checkpoint import load_streams
from ..weights.tensorfile import to_mlx
from .plan import ConversionPlan

PROMPTS = (
    "Why is the sky blue?",
    "List three uses of a paper clip.",
    "Write a short note to a friend who is ill.",
    "def add(a, b):",
)
NUM_TOKENS = 64


@dataclass(frozen=True)
class Trace:
    """What one side computed for one probe.

    insertion: (h,), main: (V,), streams: (γ, V), all at the last prompt token, float32.
    tokens: the greedy answer. steps: (position of the root in the text, its drafts) of each step.
    """

    insertion: np.ndarray
    main: np.ndarray
    streams: np.ndarray
    tokens: list[int]
    steps: list[tuple[int, list[int]]]


def probe_prompts(folder: Path, plan: ConversionPlan) -> list[list[int]]:
    """Return the probes as token ids; random ids of fixed seed where no tokenizer gives any."""
    assert plan.base is not None
    V = int(plan.base.config["vocab_size"])
    prompts: list[list[int]] = []
    if any(name.startswith("tokenizer") for name in plan.files):
        with suppress(Exception):  # whatever a damaged one does: the weights are proved without
            prompts = _encoded(folder)
    if prompts and all(prompt and max(prompt) < V for prompt in prompts):
        return prompts
    generator = np.random.default_rng(0)
    return [generator.integers(0, V, 16).tolist() for _ in PROMPTS]


def _encoded(folder: Path) -> list[list[int]]:
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template is None:
        return [list(tokenizer.encode(text)) for text in PROMPTS]
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    return [
        list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        for chat in chats
    ]


def trace_folder(folder: Path, prompts: Sequence[list[int]]) -> list[Trace]:
    """Decode the probes with the finished folder: greedy, chains of all streams."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if not (folder / "streams_config.json").exists():
        return [_trace_plain(model, prompt) for prompt in prompts]
    weights = load_streams(folder)
    weights.check_base(model)
    streams = Streams(Backbone(model), weights.config, weights.tensors)
    return [_trace_streams(streams, prompt) for prompt in prompts]


def trace_plan(plan: ConversionPlan, prompts: Sequence[list[int]]) -> list[Trace]:
    """Decode the probes with what a plan would write, as it is in memory."""
    assert plan.base is not None
    model = plan.base.model
    weights = [
        (spec.name, to_mlx(bits, spec.dtype))
        for tensor in plan.base.tensors
        for spec, bits in zip(tensor.outputs, tensor.make(), strict=True)
    ]
    model.load_weights(weights)
    model.eval()
    if plan.streams is None:
        return [_trace_plain(model, prompt) for prompt in prompts]
    tensors = {each.name: to_mlx(each.make()[0], each.dtype) for each in plan.streams.tensors}
    streams = Streams(Backbone(model), plan.streams.config, tensors)
    return [_trace_streams(streams, prompt) for prompt in prompts]


def _trace_streams(streams: Streams, prompt: list[int]) -> Trace:
    config = DecodeConfig(tree=TreeSpec(kind="chain", branching=1))
    decoder = StreamDecoder(streams, config, TokenSampler(), keep_drafts=True)
    cache = KVCache(streams.backbone.num_layers)
    decoder.prefill(prompt[:-1], cache)
    look = StreamDrafter(streams, inline=True)
    root = root_only(mx.array([prompt[-1]]))
    alone = replace(look, inline=False).verify(root, cache)
    following = mx.argmax(streams.backbone.head(alone.last)[0], axis=-1)
    seen = look.verify(root, cache, following)
    assert seen.streams is not None
    normed = streams.backbone.norm(seen.streams)[0, 0]
    heads = [streams.backbone.head(x)[0] for x in (seen.last, normed[None])]
    main, stream_logits = _floats(heads[0][0]), _floats(heads[1])
    insertion = _floats(seen.first[0, 0])

    tokens: list[int] = []
    steps: list[tuple[int, list[int]]] = []
    for result in decoder.steps(prompt[-1], cache, MaxTokens()):
        if result.draft is not None and len(result.draft.tokens) > 1:
            steps.append((len(prompt) + len(tokens) - 1, result.draft.tokens[1:]))
        tokens += result.tokens
        if len(tokens) >= NUM_TOKENS:
            break
    return Trace(insertion, main, stream_logits, tokens[:NUM_TOKENS], steps)


def _trace_plain(model: nn.Module, prompt: list[int]) -> Trace:
    """Decode greedily with mlx-lm's model itself, where there are no streams."""
    ids, main = list(prompt), np.zeros(0)
    for count in range(NUM_TOKENS // 4):
        logits = _floats(model(mx.array([ids]))[0, -1])
        main = logits if count == 0 else main
        ids.append(int(logits.argmax()))
    nothing = np.zeros((0, main.size), np.float32)
    return Trace(np.zeros(0, np.float32), main, nothing, ids[len(prompt) :], [])


def _floats(values: mx.array) -> np.ndarray:
    return np.array(values.astype(mx.float32))
