"""Rows in a few bits: stored, attended and turned quantised as in mlx-lm's plain decoding."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from mlx_specstream.config import CacheConfig, DecodeConfig, TreeSpec
from mlx_specstream.errors import OptionError
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import QuantizedLayer, as_mlx_lm, from_mlx_lm
from mlx_specstream.model.cache.kinds import check_quantised
from mlx_specstream.speculation.streams import Streams
from tests.support.engine import (
    decode,
    mlx_lm_tokens,
    plain,
    random_streams,
    random_tensors,
    small_model,
    stream_config,
    table_decoder,
)
from tests.support.exactness.compare import rows_differ

PROMPT = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def streams() -> Streams:
    return random_streams(small_model(layers=3, seed=1, head_dim=32), stream_config(), 1)


def options(bits: int, start: int) -> dict[str, Any]:
    return {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": start}


@pytest.mark.parametrize("start", [0, 5, 9, 15, 17, 23, 99])
@pytest.mark.parametrize("schedule", ["inline", "deferred"])
def test_drafts_across_the_start_are_mlx_lms(streams: Streams, start: int, schedule: str) -> None:
    """Most drafts are right, so a path often reaches over the row from which on rows are quantised."""
    model = streams.backbone.model
    theirs = make_prompt_cache(model)
    wanted = mlx_lm_tokens(model, PROMPT, 30, prompt_cache=theirs, **options(4, start))
    cache = streams.backbone.new_cache(CacheConfig(**options(4, start)))
    config = DecodeConfig(TreeSpec(rows=8), schedule=schedule)  # type: ignore[arg-type]
    run = decode(table_decoder(streams, config), PROMPT, 30, cache=cache)
    assert run.tokens[:30] == wanted
    assert run.accepted > 10
    cache.cut(len(PROMPT) + 29)
    assert rows_differ(cache, from_mlx_lm(theirs), mx.float32) == ""
    turned = isinstance(cache.layers[0], QuantizedLayer)
    assert turned == (start <= 34)
    assert turned == isinstance(theirs[0], QuantizedKVCache)


def test_an_answer_cut_before_the_start_is_not_quantised(streams: Streams) -> None:
    cache = streams.backbone.new_cache(CacheConfig(**options(4, 12)))
    decoder = table_decoder(streams, DecodeConfig(TreeSpec(rows=8)))
    reached = decode(decoder, PROMPT, 9, cache=cache).cache.length
    assert reached >= 12
    cache.cut(9)
    cache.turn_quantized()
    assert not isinstance(cache.layers[0], QuantizedLayer)
    cache.advance(2, generated=True)
    cache.turn_quantized()  # the drawn token's pass is the one that fills row 11
    assert isinstance(cache.layers[0], QuantizedLayer)


def test_both_ways_between_mlx_lm_and_us(streams: Streams) -> None:
    model = streams.backbone.model
    theirs, same = make_prompt_cache(model), make_prompt_cache(model)
    for caches in (theirs, same):
        mlx_lm_tokens(model, PROMPT, 9, prompt_cache=caches, **options(8, 6))
    ours = from_mlx_lm(theirs)
    wanted = mlx_lm_tokens(model, [5, 6], 12, prompt_cache=same)
    run = decode(table_decoder(streams, DecodeConfig()), [5, 6], 6, cache=ours)
    rest = mlx_lm_tokens(model, run.tokens[-1:], 12, prompt_cache=as_mlx_lm(ours))
    assert (run.tokens + rest)[:12] == wanted


def test_what_cannot_be_quantised_is_refused(streams: Streams) -> None:
    backbone = streams.backbone
    check_quantised(backbone.forward, backbone.windows, CacheConfig(**options(4, 0)))
    with pytest.raises(OptionError, match="do not divide into such groups"):
        check_quantised(backbone.forward, backbone.windows, CacheConfig(kv_bits=4))


def test_rewinding_leaves_rows_quantised(streams: Streams) -> None:
    cache = streams.backbone.new_cache(CacheConfig(**options(4, 8)))
    decode(table_decoder(streams, DecodeConfig()), PROMPT, 12, cache=cache)
    rows = np.array(cache.layers[1].read(6)[0])
    cache.rewind(6)
    assert isinstance(cache.layers[1], QuantizedLayer)
    np.testing.assert_array_equal(np.array(cache.layers[1].read(6)[0]), rows)
    assert not isinstance(cache.fresh().layers[1], QuantizedLayer)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_gates_of_shared_streams_on_grouped_heads(heads: int, bits: int) -> None:
    """Trees decode as a token per pass does, and as a plain cache does but for what bits lose."""
    model = small_model(layers=3, seed=2, head_dim=32, num_key_value_heads=heads)
    backbone, config = Backbone(model), stream_config(mode="shared")
    tensors = random_tensors(backbone, config, 3, scale=0.1, gates=True)
    streams = Streams(backbone, config, tensors)
    caches = [backbone.new_cache(CacheConfig(**options(bits, 3))) for _ in range(2)]
    expected = plain(streams, PROMPT, 20, cache=caches[0])
    run = decode(
        table_decoder(streams, DecodeConfig(TreeSpec(rows=8))), PROMPT, 20, cache=caches[1]
    )
    assert run.tokens[:20] == expected.tokens[:20]
    assert run.accepted > 0

    unlike = {name: tensor for name, tensor in tensors.items() if "stream_gate" not in name}
    ungated = plain(Streams(backbone, config, unlike), PROMPT, 1, cache=backbone.new_cache())
    plainly = plain(streams, PROMPT, 1, cache=backbone.new_cache())
    error = mx.abs(expected.steps[0].logits - plainly.steps[0].logits).max().item()
    effect = mx.abs(ungated.steps[0].logits - plainly.steps[0].logits).max().item()
    assert bits == 4 or error < effect / 2
