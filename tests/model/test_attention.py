"""Attention in pieces is attention: what Metal's kernels do not take at once they take in parts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import base

from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.model import attention
from mlx_specstream.model.attention import FusedAttention, attend
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.speculation.plain import PlainDecoder
from mlx_specstream.speculation.result import MaxTokens
from mlx_specstream.speculation.sampling import TokenSampler
from tests.support.engine import random_streams, small_model, stream_config, table_decoder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on Metal; the rows of every call that attention is done in."""
    made: list[int] = []
    original = base.scaled_dot_product_attention

    def note(queries: mx.array, *args: Any, **named: Any) -> mx.array:
        made.append(queries.shape[2])
        return original(queries, *args, **named)

    monkeypatch.setattr(attention, "_attention", note)
    monkeypatch.setattr(attention, "on_metal", lambda: True)
    return made


def test_pieces_are_few_alike_and_fused() -> None:
    for group in (1, 2, 3, 5, 6, 7, 8, 16):
        for head_dim in (64, 72, 96, 128, 192, 256):
            heads = FusedAttention(4 * group, 4, head_dim)
            for rows in range(1, 33):
                pieces = heads.pieces(rows)
                assert sum(pieces) == rows
                assert max(pieces) - min(pieces) <= 1
                assert len(pieces) == 1 or all(map(heads.takes, pieces))
                assert not any(map(heads.loses, pieces))
    assert FusedAttention(28, 4, 128).pieces(5) == [3, 2]
    assert FusedAttention(28, 4, 128).pieces(9) == [9]
    assert FusedAttention(8, 4, 256).pieces(16) == [8, 8]
    assert FusedAttention(8, 4, 256).pieces(2048) == [2048]


def test_which_heads_are_fused() -> None:
    """The shapes that MLX 0.32.4's Metal library has attention for, few rows and many."""
    few = {(64, 64), (96, 96), (128, 128), (256, 256), (192, 128), (96, 64)}
    many = {(64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (96, 64)}
    sizes = (48, 64, 72, 80, 96, 112, 128, 192, 256, 512)
    for query in sizes:
        for value in sizes:
            heads = FusedAttention(8, 4, query, value)
            assert heads.takes(8) is ((query, value) in few)
            assert heads.takes(9) is ((query, value) in many)
    # DeepSeek-V2's: a wide tree in pieces of the kernel that plain decoding is on.
    assert FusedAttention(16, 16, 192, 128).pieces(12) == [6, 6]


def test_values_may_have_fewer_channels_than_keys(calls: list[int]) -> None:
    random = np.random.default_rng(0)
    shapes = ((1, 2, 12, 192), (1, 2, 20, 192), (1, 2, 20, 128))
    q, k, v = (mx.array(random.normal(size=shape).astype(np.float32)) for shape in shapes)
    found = attend(q, k, v, None, 0.07, "causal")
    wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.07, mask="causal")
    assert mx.allclose(found, wanted, atol=1e-6).item()
    assert calls == [6, 6]


@pytest.mark.parametrize("kind", ["array", "heads", "additive", "causal", "none"])
@pytest.mark.parametrize("rows", [2, 5, 8, 9])
def test_every_row_sees_the_same_in_pieces(kind: str, rows: int, calls: list[int]) -> None:
    random = np.random.default_rng(rows)
    made = [random.normal(size=(2, n, s, 64)) for n, s in ((14, rows), (2, 20), (2, 20))]
    q, k, v = (mx.array(array.astype(np.float32)) for array in made)
    seen = mx.array(random.random(size=(2, 1, rows, 20)) < 0.5) | (mx.arange(20) == 0)
    masks: dict[str, Any] = {
        "array": seen[0, 0],
        "heads": mx.broadcast_to(seen, (2, 14, rows, 20)),
        "additive": mx.where(seen, mx.array(random.normal(size=(2, 1, rows, 20))), -mx.inf).astype(
            mx.float32
        ),
        "causal": "causal",
        "none": None,
    }
    sinks = mx.array(random.normal(size=14).astype(np.float32))
    for given in ({}, {"sinks": sinks}):
        calls.clear()
        found = attend(q, k, v, None, 0.125, masks[kind], **given)
        wanted = mx.fast.scaled_dot_product_attention(
            q, k, v, scale=0.125, mask=masks[kind], **given
        )
        assert mx.allclose(found, wanted, atol=1e-6).item()
        assert calls == FusedAttention(14, 2, 64).pieces(rows)
    assert (len(calls) > 1) == (5 <= rows <= 8)


def wide_model() -> nn.Module:
    """Seven query heads on one key head, of 64 channels: up to four rows are fused."""
    return small_model(
        layers=4, vocab=64, attention=0.3, num_attention_heads=7, num_key_value_heads=1, head_dim=64
    )


@pytest.mark.parametrize(
    ("setting", "split"),
    [
        (DecodeConfig(TreeSpec(rows=6)), [3, 3]),  # also the streams of its root: five rows
        (DecodeConfig(TreeSpec(rows=3), schedule="deferred"), [3, 3]),  # six streams of one node
    ],
)
def test_decoding_attends_in_pieces(
    setting: DecodeConfig, split: list[int], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wide_model()
    streams = random_streams(model, stream_config(num_streams=6), scale=0.05)
    prompt = list(range(1, 30))

    def answer() -> list[int]:
        decoder = table_decoder(streams, setting)
        cache = streams.backbone.new_cache()
        decoder.prefill(prompt[:-1], cache)
        steps = decoder.steps(prompt[-1], cache, MaxTokens(24))
        return [token for result in steps for token in result.tokens]

    found = answer()
    assert not any(4 < rows <= 8 for rows in calls)
    assert any(calls[i : i + 2] == split for i in range(len(calls))), calls[:60]
    monkeypatch.setattr(attention, "on_metal", lambda: False)
    calls.clear()
    assert answer() == found
    assert any(4 < rows <= 8 for rows in calls)
    plain, cache = PlainDecoder(streams.backbone, TokenSampler()), streams.backbone.new_cache()
    plain.prefill(prompt[:-1], cache)
    alone = [t for r in plain.steps(prompt[-1], cache, MaxTokens(24)) for t in r.tokens]
    assert found[:24] == alone[:24]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "cohere"])
def test_layers_of_every_family_find_it(family: str, calls: list[int]) -> None:
    model = small_model(family, layers=6)
    backbone = Backbone(model)
    calls.clear()
    model(mx.array([[1, 2, 3]]))
    assert calls == []  # the user's model is as it was
    backbone.forward(mx.array([1, 2, 3]), backbone.new_cache())
    assert calls == [3] * 6
