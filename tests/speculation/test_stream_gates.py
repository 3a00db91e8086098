"""Gates on what the main stream reads from its own streams, in shared mode."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache

from mlx_specstream.config import CacheConfig, DecodeConfig, TreeSpec
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.speculation.streams import Streams
from tests.support.engine import (
    decode,
    mlx_lm_tokens,
    plain,
    random_tensors,
    small_model,
    stream_config,
    stream_decoder,
)

PROMPT = (3, 1, 4, 1, 5)


def gated(gate: float | None, adapters: float = 0.5) -> Streams:
    """Return shared streams with `gate` on every head of every MSA layer, or without gates."""
    backbone = Backbone(small_model(layers=4))
    config = stream_config(mode="shared")
    tensors = random_tensors(backbone, config)
    for name in tensors:
        if name.endswith("lora_b") and name.startswith("layers."):
            tensors[name] = tensors[name] * (adapters / 0.5)
    if gate is not None:
        heads = backbone.model.layers[0].self_attn.n_heads
        for index in (2, 3):
            tensors[f"layers.{index}.stream_gate"] = mx.full((heads,), gate)
    return Streams(backbone, config, tensors)


def step_logits(streams: Streams) -> np.ndarray:
    return np.array(plain(streams, PROMPT, 1).steps[0].logits)


def test_gate_of_zero_changes_nothing() -> None:
    np.testing.assert_allclose(step_logits(gated(0.0)), step_logits(gated(None)), atol=1e-5)


def test_closed_gate_hides_the_streams_from_main() -> None:
    closed = gated(-1e9, adapters=0.0)
    model = closed.backbone.model
    base = np.array(model(mx.array([PROMPT]))[0, -1:])
    np.testing.assert_allclose(step_logits(closed), base, atol=1e-5)
    assert np.abs(step_logits(gated(None, adapters=0.0)) - base).max() > 1e-2


@pytest.mark.parametrize("tree", ["chain", "6", "2^2"])
def test_gated_trees_decode_as_gated_plain_decoding(tree: str) -> None:
    streams = gated(-0.7)
    expected = plain(streams, PROMPT, 16).tokens
    decoder = stream_decoder(streams, DecodeConfig(TreeSpec.parse(tree)))
    assert decode(decoder, PROMPT, 16).tokens[:16] == expected[:16]


@pytest.mark.parametrize("tree", ["chain", "6"])
def test_a_gate_stays_on_the_streams_where_a_rotating_cache_keeps_rows_behind_them(
    tree: str,
) -> None:
    """A pass's rows stand before the committed rows that its window has yet to drop."""
    closed = gated(-1e9, adapters=0.0)
    prompt = [(7 * n + 3) % closed.backbone.vocab_size for n in range(20)]
    caching = CacheConfig(max_kv_size=12)

    def tokens(streams: Streams, config: DecodeConfig | None) -> list[int]:
        cache = streams.backbone.new_cache(caching)
        if config is None:
            return plain(streams, prompt, 24, cache=cache).tokens[:24]
        return decode(stream_decoder(streams, config), prompt, 24, cache=cache).tokens[:24]

    base = mlx_lm_tokens(
        closed.backbone.model,
        prompt,
        24,
        prompt_cache=[RotatingKVCache(max_size=12, keep=4) for _ in closed.backbone.model.layers],
    )
    assert tokens(closed, None) == base
    assert tokens(closed, DecodeConfig(TreeSpec.parse(tree))) == base
    half = gated(-0.7)
    assert tokens(half, DecodeConfig(TreeSpec.parse(tree))) == tokens(half, None)
