"""Windows that move on: the same rows in sight as in mlx-lm, and a rejected draft costs none."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from mlx_specstream.config import CacheConfig, DecodeConfig, PruneSpec, TreeSpec
from mlx_specstream.errors import OptionError
from mlx_specstream.model.cache import (
    KVCache,
    LayerKV,
    RotatingLayer,
    Span,
    as_mlx_lm,
    from_mlx_lm,
    new_cache,
    to_mlx_lm,
)
from tests.support.engine import (
    decode,
    mlx_lm_tokens,
    random_streams,
    small_model,
    stream_config,
    table_decoder,
)

SIZE = 9
PROMPT = [int(t) for t in np.random.default_rng(0).integers(0, 12, 23)]


def rotating(model: Any, size: int = SIZE) -> list[Any]:
    return [RotatingKVCache(max_size=size, keep=4) for _ in model.layers]


def assert_same_rows(ours: KVCache, theirs: list[Any]) -> None:
    """mlx-lm's cache holds the token to come as well, and so one old row less."""
    other = from_mlx_lm(theirs)
    assert other.length == ours.length + 1
    for mine, its in zip(ours.layers, other.layers, strict=True):
        if isinstance(mine, RotatingLayer) and isinstance(its, RotatingLayer):
            first = max(mine.span.first, its.span.needed)
            rows = (mine.between(first, ours.length), its.between(first, ours.length))
        else:
            rows = (mine.read(ours.length), its.read(ours.length))
        for a, b in zip(*rows, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)


@pytest.mark.parametrize("schedule", ["inline", "deferred"])
@pytest.mark.parametrize("length", [1, 3, SIZE - 1, SIZE, SIZE + 1, 23])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_max_kv_size_is_mlx_lms(schedule: str, length: int, chunk: int) -> None:
    model = small_model(layers=3, seed=1)
    streams = random_streams(model, stream_config(), 1)
    theirs = rotating(model)
    wanted = mlx_lm_tokens(model, PROMPT[:length], 24, prompt_cache=theirs, prefill_step_size=chunk)
    config = DecodeConfig(TreeSpec(rows=9), PruneSpec(keep=6), schedule)  # type: ignore[arg-type]
    cache = streams.backbone.new_cache(CacheConfig(max_kv_size=SIZE))
    run = decode(table_decoder(streams, config), PROMPT[:length], 24, cache=cache, chunk=chunk)
    assert run.tokens[:24] == wanted
    assert run.accepted > 0
    cache.cut(length + 23)
    assert_same_rows(cache, theirs)


def test_sliding_layers_hold_their_window_and_no_more() -> None:
    window, tokens = 7, 700
    model = small_model(layers=3, seed=1, window=window)
    streams = random_streams(model, stream_config(), 1)
    theirs = make_prompt_cache(model)
    wanted = mlx_lm_tokens(model, PROMPT, tokens, prompt_cache=theirs)
    cache = streams.backbone.new_cache()
    run = decode(
        table_decoder(streams, DecodeConfig(TreeSpec(rows=8))), PROMPT, tokens, cache=cache
    )
    assert run.tokens[:tokens] == wanted
    sliding = cache.layers[1]
    assert isinstance(sliding, RotatingLayer)
    assert sliding.dropped > 300
    assert sliding.arrays[0].shape[2] <= 512
    full = cache.layers[0]
    assert type(full) is LayerKV
    cache.cut(len(PROMPT) + tokens - 1)
    assert_same_rows(cache, theirs)


def test_mlx_lm_goes_on_where_we_stop() -> None:
    model = small_model(layers=3, seed=2)
    streams = random_streams(model, stream_config(), 2)
    for length in (5, SIZE - 1, SIZE, 23):
        for ahead in (0, 1, 17):
            cache = streams.backbone.new_cache(CacheConfig(max_kv_size=SIZE))
            run = decode(
                table_decoder(streams, DecodeConfig(TreeSpec(rows=8))),
                PROMPT[:length],
                ahead + 1,
                cache=cache,
            )
            theirs = as_mlx_lm(cache)
            assert {c.offset for c in theirs} == {cache.length}
            rest = mlx_lm_tokens(model, run.tokens[-1:], 15, prompt_cache=theirs)
            wanted = mlx_lm_tokens(
                model, PROMPT[:length], len(run.tokens) + 15, prompt_cache=rotating(model)
            )
            assert run.tokens + rest == wanted


def test_we_go_on_where_mlx_lm_stops() -> None:
    model = small_model(layers=3, seed=2)
    streams = random_streams(model, stream_config(), 2)
    for length in (2, SIZE - 2, SIZE, 23):
        theirs, same = rotating(model), rotating(model)
        for caches in (theirs, same):
            mlx_lm_tokens(model, PROMPT[:length], 11, prompt_cache=caches)
        ours = from_mlx_lm(theirs)
        wanted = mlx_lm_tokens(model, [3, 1, 4], 15, prompt_cache=same)
        run = decode(table_decoder(streams, DecodeConfig()), [3, 1, 4], 15, cache=ours)
        assert run.tokens[:15] == wanted
        to_mlx_lm(ours, theirs)
        assert {c.offset for c in theirs} == {ours.length}


def test_a_span_shows_what_a_row_sees() -> None:
    span = Span(size=6, keep=2, length=9)
    assert (span.wrapped, span.first, span.tail) == (True, 6, 2)
    rows, keys = mx.array([9, 10]), mx.arange(11)
    near = span.near(rows, keys) & (keys[None] <= rows[:, None])
    assert near.sum(axis=1).tolist() == [6, 6]
    # columns 6 7 8 | 9 10 | 0 1
    assert span.columns(near).astype(mx.int32).tolist() == [
        [1, 1, 1, 1, 0, 1, 1],
        [0, 1, 1, 1, 1, 1, 1],
    ]
    chunk = span.near_in_chunk(rows, keys) & (keys[None] <= rows[:, None])
    assert span.columns(chunk).astype(mx.int32).tolist() == [
        [1, 1, 1, 1, 0, 1, 1],
        [1, 1, 1, 1, 1, 0, 1],
    ]


def test_rewinding_is_refused_once_rows_are_gone() -> None:
    cache = KVCache.of([RotatingLayer(8, 0, slack=4, drop=0)])
    for step in range(40):
        row = mx.full((1, 1, 1, 2), step)
        cache.view(0, cache.length, cache.length).update_and_fetch(row, row)
        cache.advance(1)
    layer = cache.layers[0]
    assert isinstance(layer, RotatingLayer)
    assert layer.dropped == 28
    assert cache.can_rewind(36)
    with pytest.raises(OptionError, match="windows move on"):
        cache.rewind(35)
    with pytest.raises(OptionError, match="older ones are gone"):
        cache.copy(35)
    other = cache.copy(36)
    cache.rewind(36)
    assert layer.read(36)[0][0, 0, :, 0].tolist() == [29, 30, 31, 32, 33, 34, 35]
    assert other.layers[0].read(36)[0][0, 0, :, 0].tolist() == [29, 30, 31, 32, 33, 34, 35]
    fresh = cache.fresh()
    assert (fresh.length, fresh.arrays) == (0, [])


def test_caches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match="sliding window of 7"):
        from_mlx_lm([RotatingKVCache(max_size=8)], [7])
    with pytest.raises(OptionError, match="cannot keep the first 4"):
        from_mlx_lm([RotatingKVCache(max_size=4, keep=4)])
    with pytest.raises(OptionError, match="make_prompt_cache"):
        to_mlx_lm(new_cache([None], CacheConfig(max_kv_size=8)), [RotatingKVCache(max_size=9)])
    for wrong in ({"max_kv_size": 4}, {"kv_bits": 7}, {"kv_bits": 4, "max_kv_size": 64}):
        with pytest.raises(OptionError, match=r"max_kv_size|kv_bits"):
            CacheConfig(**wrong)
    with pytest.raises(OptionError, match="sliding-window layers"):
        new_cache([None, 8], CacheConfig(kv_bits=4))


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("size", [6, 9])
def test_as_many_rows_as_slack_may_be_taken_back(keep: int, size: int) -> None:
    """Also where the window first moves, and lets go of the rows that stay apart."""
    slack = 3
    cache = KVCache.of([RotatingLayer(size, keep, slack, drop=0)])
    for length in range(1, 3 * size):
        row = mx.full((1, 1, 1, 2), length)
        cache.layers[0].write(length - 1, row, row)
        cache.advance(1)
        for back in range(min(slack, length) + 1):
            assert cache.can_rewind(length - back)
    assert cache.layers[0].dropped > 0


def test_a_layer_without_attention_is_copied_with_the_others() -> None:
    cache = new_cache([None, None], CacheConfig(max_kv_size=5))
    for length in range(9):
        row = mx.full((1, 1, 1, 2), length)
        cache.layers[0].write(length, row, row)
        cache.advance(1)
    copied = cache.copy(9)
    assert copied.length == 9
    assert copied.layers[1].arrays == []
    assert mx.array_equal(copied.layers[0].read(9)[0], cache.layers[0].read(9)[0])
