"""Attention in pieces is attention: what Metal's kernels do not take at once they take in parts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base

from mlx_specstream.config import DecodeConfig, PruneSpec, TreeSpec
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
    assert FusedAttention(16, 16, 192, 128).pieces(12) == [6, 6]  # keys wider than values
    assert FusedAttention(16, 16, 192).pieces(12) == [12]
    assert FusedAttention(16, 16, 64, 32).pieces(12) == [12]


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
@pytest.mark.parametrize(
    "length", [20, 1030, 4100]
)  # MLX has other kernels from 1,024 and 4,096 on
def test_every_row_sees_the_same_in_pieces(
    kind: str, rows: int, length: int, calls: list[int]
) -> None:
    random = np.random.default_rng(rows)
    made = [random.normal(size=(2, n, s, 64)) for n, s in ((14, rows), (2, length), (2, length))]
    q, k, v = (mx.array(array.astype(np.float32)) for array in made)
    seen = mx.array(random.random(size=(2, 1, rows, length)) < 0.5) | (mx.arange(length) == 0)
    masks: dict[str, Any] = {
        "array": seen[0, 0],
        "heads": mx.broadcast_to(seen, (2, 14, rows, length)),
        "additive": mx.where(
            seen, mx.array(random.normal(size=(2, 1, rows, length)).astype(np.float32)), -mx.inf
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


HEADS = {
    "7 of 64": (7, 1, 64),  # up to 4 rows are fused, and more than 8
    "8 of 128": (8, 1, 128),  # the same
    "4 of 64": (4, 1, 64),  # all
    "4 of 256": (4, 1, 256),  # up to 8
    "16 of 64": (16, 1, 64),  # up to 2, and more than 8
    "4 of 80": (4, 1, 80),  # plain decoding is not: nothing is lost
    "4 of 192": (4, 1, 192),  # the same
}
PASSES = {
    # Of a setting with six streams: the rows of its root alone, of the tree, and of what follows it.
    "chain": (DecodeConfig(TreeSpec(kind="chain", branching=1), schedule="deferred"), {1, 7, 6}),
    "tree": (DecodeConfig(TreeSpec(rows=12), schedule="deferred"), {1, 7, 12, 6}),
    "small tree": (DecodeConfig(TreeSpec(rows=5), schedule="deferred"), {1, 7, 5, 6}),
    "pruned": (
        DecodeConfig(TreeSpec(rows=12), PruneSpec(5), schedule="deferred"),
        {1, 7, 12, 5, 6},
    ),
    "inline": (DecodeConfig(TreeSpec(rows=3), schedule="inline"), {1, 7, 3, 21}),
    "few streams": (
        DecodeConfig(TreeSpec(rows=6), schedule="inline", stream_nodes=1),
        {1, 7, 6, 12},
    ),
}


@pytest.mark.parametrize("passes", list(PASSES))
@pytest.mark.parametrize("kind", list(HEADS))
def test_every_pass_of_a_setting_is_fused_if_plain_decoding_is(
    kind: str, passes: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lower and upper layers, streams behind them or in them, a pruned tree, the root alone."""
    heads = FusedAttention(*HEADS[kind])
    model = small_model(
        layers=3,
        vocab=64,
        attention=0.3,
        num_attention_heads=heads.num_heads,
        num_key_value_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
    )
    streams = random_streams(model, stream_config(num_streams=6), scale=0.05)
    prompt = list(range(1, 60))  # a chunk that is not taken in pieces
    setting, expected = PASSES[passes]

    def answer() -> list[int]:
        decoder = table_decoder(streams, setting)
        cache = streams.backbone.new_cache()
        decoder.prefill(prompt[:-1], cache)
        calls.clear()
        steps = decoder.steps(prompt[-1], cache, MaxTokens(24))
        return [token for result in steps for token in result.tokens]

    found, pieces = answer(), list(calls)
    assert not any(map(heads.loses, pieces))
    monkeypatch.setattr(attention, "on_metal", lambda: False)
    assert answer() == found
    assert set(calls) == expected
    assert sum(calls) == sum(pieces)
    assert (calls != pieces) == any(map(heads.loses, calls))
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
