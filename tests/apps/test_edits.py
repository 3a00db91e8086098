"""One cache through many turns that go on or go back: each answer is that of a fresh start."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_specstream.apps.prefix import PrefixCache
from mlx_specstream.cache import RotatingLayer, new_cache
from mlx_specstream.config import CacheConfig, DecodeConfig, TreeSpec
from mlx_specstream.streams import Streams
from tests.engine import (
    decode,
    mlx_lm_tokens,
    random_streams,
    small_model,
    stream_config,
    table_decoder,
)

LONGEST = 90  # tokens of text, after which a conversation begins anew


def answered(streams: Streams, prefix: PrefixCache, text: list[int], tokens: int) -> list[int]:
    rest = prefix.reuse(text)
    start = prefix.kv.length
    decoder = table_decoder(streams, DecodeConfig(TreeSpec(rows=6)))
    found = decode(decoder, rest, tokens, cache=prefix.kv).tokens[:tokens]
    prefix.kv.cut(start + len(rest) + tokens - 1)
    prefix.settle(text + found)
    return found


@pytest.mark.parametrize("window", [None, 7], ids=["plain", "sliding"])
def test_200_turns_on_one_cache(window: int | None) -> None:
    model = small_model(layers=3, seed=1, window=window)
    streams = random_streams(model, stream_config(), 1)
    kv = new_cache(streams.backbone.windows, slack=5, drop=9)
    prefix, rng = PrefixCache(kv), np.random.default_rng(0)
    text: list[int] = []
    reused = begun_anew = 0
    for turn in range(200):
        back = len(text) if rng.random() < 0.4 else int(rng.integers(0, len(text) + 1))
        said = rng.integers(0, 12, int(rng.integers(1, 6))).tolist()
        text = [*text[: back if len(text) < LONGEST else 0], *said]
        before = prefix.kv
        tokens = int(rng.integers(1, 5))
        found = answered(streams, prefix, text, tokens)
        begun_anew += prefix.kv is not before
        reused += prefix.kv is before and prefix.kv.length > len(said) + tokens
        assert found == mlx_lm_tokens(model, text, tokens), f"turn {turn}"
        text = text + found
    assert reused > 100
    assert (begun_anew > 0) == (window is not None)
    assert window is None or isinstance(prefix.kv.layers[1], RotatingLayer)


def test_a_moved_window_with_first_rows_is_begun_anew() -> None:
    model = small_model(layers=3, seed=1)
    streams = random_streams(model, stream_config(), 1)
    prefix = PrefixCache(new_cache(streams.backbone.windows, CacheConfig(max_kv_size=12)))
    text = [1, 2, 3, 4, 5]
    text += answered(streams, prefix, text, 4)
    assert len(prefix.reuse([*text[:6], 0])) == 1  # all rows are still in sight
    prefix.settle(text)
    text += answered(streams, prefix, [*text, 7], 9)
    assert prefix.kv.length > 12
    assert len(prefix.reuse([*text[:8], 0])) == 9
    assert prefix.kv.length == 0


def test_quantised_rows_are_reused_but_not_for_a_new_beginning() -> None:
    model = small_model(layers=3, seed=1, head_dim=32)
    streams = random_streams(model, stream_config(), 1)
    config = CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=4)
    prefix = PrefixCache(new_cache(streams.backbone.windows, config))
    text = [1, 2, 3, 4, 5]
    text += answered(streams, prefix, text, 4)
    assert len(prefix.reuse([*text[:6], 0])) == 1
    assert prefix.kv.layers[0].depends_on_passes
    assert prefix.reuse([9, 9]) == [9, 9]
    assert not prefix.kv.layers[0].depends_on_passes
