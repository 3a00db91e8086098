"""One cache through many turns that go on or go back: each answer is that of a fresh start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mlx_specstream.apps.prefix import PrefixCache
from mlx_specstream.config import CacheConfig, DecodeConfig, TreeSpec
from mlx_specstream.model.cache import RotatingLayer, new_cache
from mlx_specstream.speculation.streams import Streams
from tests.support.engine import (
    decode,
    mlx_lm_tokens,
    random_streams,
    small_model,
    stream_config,
    table_decoder,
)
from tests.support.exactness.models import streams_for

LONGEST = 90  # tokens of text, after which a conversation begins anew


def answered(streams: Streams, prefix: PrefixCache, text: list[int], tokens: int) -> list[int]:
    rest = prefix.reuse(text)
    start = prefix.kv.length
    tree = TreeSpec.parse("chain" if streams.backbone.is_recurrent else "6")
    decoder = table_decoder(streams, DecodeConfig(tree))
    found = decode(decoder, rest, tokens, cache=prefix.kv).tokens[:tokens]
    prefix.kv.cut(start + len(rest) + tokens - 1)
    prefix.settle(text + found)
    return found


@dataclass
class Talked:
    """How often turns went on from rows that were held, and how often anew."""

    reused: int = 0
    begun_anew: int = 0


def talk(streams: Streams, prefix: PrefixCache, turns: int, seed: int = 0) -> Talked:
    """Edit a text and have it answered, again and again; each answer must be mlx-lm's from scratch."""
    rng, talked = np.random.default_rng(seed), Talked()
    text: list[int] = []
    for turn in range(turns):
        back = len(text) if rng.random() < 0.4 else int(rng.integers(0, len(text) + 1))
        said = rng.integers(0, 12, int(rng.integers(1, 6))).tolist()
        text = [*text[: back if len(text) < LONGEST else 0], *said]
        before = prefix.kv
        tokens = int(rng.integers(1, 5))
        found = answered(streams, prefix, text, tokens)
        talked.begun_anew += prefix.kv is not before
        talked.reused += prefix.kv is before and prefix.kv.length > len(said) + tokens
        assert found == mlx_lm_tokens(streams.backbone.model, text, tokens), f"turn {turn}"
        text = text + found
    return talked


@pytest.mark.parametrize("window", [None, 7], ids=["plain", "sliding"])
def test_200_turns_on_one_cache(window: int | None) -> None:
    model = small_model(layers=3, seed=1, window=window)
    streams = random_streams(model, stream_config(), 1)
    prefix = PrefixCache(new_cache(streams.backbone.windows, slack=5, drop=9))
    talked = talk(streams, prefix, 200)
    assert talked.reused > 100
    assert (talked.begun_anew > 0) == (window is not None)
    assert window is None or isinstance(prefix.kv.layers[1], RotatingLayer)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_5", "gpt_oss"])
def test_30_turns_of_other_families(family: str) -> None:
    streams = streams_for(family, 0, "float32", False)
    assert talk(streams, PrefixCache(streams.backbone.new_cache(slack=5, drop=9)), 30).reused > 3


FAMILIES = ("deepseek_v3", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "kimi_linear")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_200_turns_of_other_families(family: str) -> None:
    streams = streams_for(family, 1, "float32", False)
    talked = talk(streams, PrefixCache(streams.backbone.new_cache(slack=5, drop=9)), 200, seed=1)
    assert talked.reused > 20


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
