"""Models that say what a test wants, and drafts that are always right.

`script` is a logits processor that makes any model write given tokens. `right_drafts` replaces
every draft by the tokens that will come, so that each step accepts as many as there are streams.
`accept_one_draft` makes an engine that is wrong, for those who are to notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation import step
from mlx_specstream.speculation.sampling import LogitsProcessor
from mlx_specstream.speculation.step import Step, Stepper
from mlx_specstream.speculation.tree import DraftTree, chain
from mlx_specstream.weights.checkpoint import fingerprint, save_streams
from tests.support.engine import committed_rows, random_streams, random_tensors, stream_config

NUM_STREAMS = 4


def with_streams(model: nn.Module, **fields: Any) -> StreamModel:
    """Return a model with random streams, as `load` returns one."""
    streams = random_streams(model, stream_config(num_streams=NUM_STREAMS, **fields))
    return StreamModel(model, streams.backbone, streams, "tiny", "random")


def save_random_streams(folder: Path, model: nn.Module, **fields: Any) -> Path:
    """Write random streams for `model` as an adapter folder (or into its model folder)."""
    backbone = Backbone(model)
    config = stream_config(num_streams=NUM_STREAMS, **fields)
    tensors = random_tensors(backbone, config)
    save_streams(folder, config, tensors, base_model="tiny", fingerprint=fingerprint(model))
    return folder


def script(tokens: Sequence[int], prompt: Sequence[int]) -> LogitsProcessor:
    """Return a processor under which an answer to `prompt` is `tokens`, the last one for ever."""

    def process(history: mx.array, logits: mx.array) -> mx.array:
        place = min(history.shape[0] - len(prompt), len(tokens) - 1)
        ids = mx.arange(logits.shape[-1])
        return mx.where(ids == tokens[place], 0.0, -mx.inf)[None]

    return process


def right_drafts(
    monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int], prompt: Sequence[int]
) -> list[int]:
    """Draft the coming `tokens` in every step; return a list that notes each step's length."""
    original, steps = Stepper.step, []

    def step(self: Stepper, tree: DraftTree, cache: KVCache) -> Step:
        done = cache.length - (len(prompt) - 1)
        drafts = [*tokens, *[0] * NUM_STREAMS][done : done + NUM_STREAMS]
        steps.append(cache.length)
        drafted = mx.concatenate([tree.tokens[:1], mx.array(drafts, dtype=mx.int32)])
        return original(self, chain(drafted), cache)

    monkeypatch.setattr(Stepper, "step", step)
    return steps


def assert_holds(cache: KVCache, model: StreamModel, tokens: Sequence[int]) -> None:
    """Fail unless the committed rows are those of a fresh prefill of `tokens`, no more, no less."""
    assert cache.length == len(tokens)
    fresh = KVCache(len(cache.layers))
    model.backbone.forward(mx.array(list(tokens)), fresh)
    fresh.advance(len(tokens))
    for found, expected in zip(committed_rows(cache), committed_rows(fresh), strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def accept_one_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the engine: the first draft of every step counts as right."""
    original = step.accept

    def credulous(tree: DraftTree, seen: mx.array, drawn: mx.array) -> Any:
        if tree.num_nodes > 1:
            drawn = mx.concatenate([tree.tokens[1:2], drawn[1:]])
        return original(tree, seen, drawn)

    monkeypatch.setattr(step, "accept", credulous)
