"""The KV buffers are updated in place: no step copies them, whatever path was accepted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.batch import BatchDecoder
from mlx_specstream.batch.cache import BatchKVCache
from mlx_specstream.config import CacheConfig, DecodeConfig, PruneSpec, TreeSpec
from mlx_specstream.model.cache import KVCache, QuantizedLayer, RotatingLayer
from mlx_specstream.speculation.result import MaxTokens
from mlx_specstream.speculation.streams import Streams
from tests.batch.engine import as_model, with_table
from tests.support.engine import random_streams, small_model, stream_config, table_decoder

SETTINGS = {
    "chain": DecodeConfig(TreeSpec(kind="chain", branching=1)),
    "deferred": DecodeConfig(TreeSpec(rows=12), schedule="deferred"),
    "inline": DecodeConfig(TreeSpec(rows=12), schedule="inline"),
    "few streams": DecodeConfig(TreeSpec(rows=12), schedule="inline", stream_nodes=3),
    "pruned": DecodeConfig(TreeSpec(rows=12), PruneSpec(7), schedule="deferred"),
    "pruned inline": DecodeConfig(TreeSpec(rows=12), PruneSpec(7), schedule="inline"),
}
CACHES = {
    "plain": CacheConfig(),
    "8 bits": CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=0),
    "rotating": CacheConfig(max_kv_size=40),
}


def buffers(cache: KVCache | BatchKVCache) -> Iterator[mx.array]:
    """Yield every buffer; who keeps one keeps MLX from updating it in place."""
    for layer in cache.layers:
        parts = layer.parts if isinstance(layer, QuantizedLayer) else (layer,)
        for part in parts:
            assert part.keys is not None
            assert part.values is not None
            yield part.keys
            yield part.values


def addresses(cache: KVCache | BatchKVCache) -> list[tuple[int, int]]:
    """Return where each buffer is, and its rows, which tell growth from a copy."""
    return [(np.asarray(memoryview(x)).ctypes.data, x.shape[2]) for x in buffers(cache)]


def streams_for(kind: str, mode: str = "lossless") -> Streams:
    wide = {"hidden_size": 64, "head_dim": 32} if kind == "8 bits" else {}
    model = small_model(layers=4, vocab=64, attention=0.3, seed=3, **wide)
    return random_streams(model, stream_config(mode=mode, num_streams=4), scale=0.05)


@pytest.mark.parametrize("kind", list(CACHES))
@pytest.mark.parametrize("setting", [*SETTINGS, "shared"])
def test_buffers_stay_where_they_are(kind: str, setting: str) -> None:
    """Also where the accepted path lay apart, and its rows had to be brought together."""
    shared = setting == "shared"
    streams = streams_for(kind, "shared" if shared else "lossless")
    config = SETTINGS["inline" if shared else setting]
    cache = streams.backbone.new_cache(CACHES[kind], drop=1000)
    apart, seen = 0, []

    decoder = table_decoder(streams, config, keep_drafts=True)
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, 64, 50)]
    decoder.token_sampler.history[:] = prompt
    decoder.prefill(prompt[:-1], cache)
    for result in decoder.steps(prompt[-1], cache, MaxTokens(120)):
        seen.append(addresses(cache))
        assert result.draft is not None
        apart += result.draft.accepted != list(range(len(result.tokens)))
    if setting != "chain":
        assert apart > 3
    if kind == "rotating":
        assert any(isinstance(layer, RotatingLayer) for layer in cache.layers)
    moved = [
        step
        for step, (before, after) in enumerate(itertools.pairwise(seen[1:]))
        if any(a != b and a[1] == b[1] for a, b in zip(before, after, strict=True))
    ]
    assert moved == []


def peak_over_base(streams: Streams, tree: TreeSpec, schedule: str) -> tuple[int, int]:
    """Return the bytes that steps behind 4,096 tokens take for a while, and the paths apart."""
    config = DecodeConfig(tree, schedule=schedule)  # type: ignore[arg-type]
    cache = streams.backbone.new_cache()
    for layer in cache.layers:  # a text that says nothing, so that the table is often right
        layer.write(0, *[mx.zeros((1, 4, 4096, 8))] * 2)
    cache.advance(4096)
    decoder = table_decoder(streams, config, keep_drafts=True)
    apart = base = 0
    for step, result in enumerate(decoder.steps(5, cache, MaxTokens(36))):
        assert result.draft is not None
        apart += result.draft.accepted != list(range(len(result.tokens)))
        if step == 1:
            assert len(result.draft.tokens) == 16
            mx.eval(cache.arrays)
            mx.reset_peak_memory()
            base = mx.get_active_memory()
    return mx.get_peak_memory() - base, apart


@pytest.mark.parametrize("schedule", ["deferred", "inline"])
def test_a_tree_takes_no_more_memory_than_a_chain_of_as_many_rows(schedule: str) -> None:
    model = small_model(layers=6, vocab=64, attention=0.1, seed=3, num_key_value_heads=4)
    streams = random_streams(model, stream_config(num_streams=15), scale=0.05)
    chain, _ = peak_over_base(streams, TreeSpec(kind="chain", branching=1), schedule)
    tree, apart = peak_over_base(streams, TreeSpec(rows=16), schedule)
    assert apart > 2
    assert tree <= 1.5 * chain


@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_a_batch_is_updated_in_place(mode: str) -> None:
    model = as_model(streams_for("plain", mode))
    decoder = with_table(BatchDecoder(model))
    for seed in range(3):
        decoder.add([int(t) for t in np.random.default_rng(seed).integers(0, 64, 10 + seed)])
    seen, accepted = [], 0
    for _ in range(40):
        for _, result, _ in decoder.step():
            assert result is not None
            accepted += result.accepted
        seen.append(addresses(decoder.cache))
    assert accepted > 20
    for before, after in itertools.pairwise(seen[2:]):
        assert all(a == b or a[1] != b[1] for a, b in zip(before, after, strict=True))
