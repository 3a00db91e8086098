"""The KV buffers are updated in place: no step copies them, whatever path was accepted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.batch import BatchDecoder
from mlx_specstream.batch import step as batch_step
from mlx_specstream.batch.cache import BatchKVCache
from mlx_specstream.batch.step import BatchStep
from mlx_specstream.config import CacheConfig, DecodeConfig, PruneSpec, TreeSpec
from mlx_specstream.model import attention
from mlx_specstream.model.cache import GROWTH, KVCache, QuantizedLayer, RotatingLayer
from mlx_specstream.speculation import step as step_module
from mlx_specstream.speculation.drafting import DraftDecoder
from mlx_specstream.speculation.result import MaxTokens, StepReport, Verdict
from mlx_specstream.speculation.step import Step
from mlx_specstream.speculation.streams import Streams
from tests.batch.engine import as_model
from tests.support.batched import with_batch_table
from tests.support.engine import (
    random_streams,
    small_model,
    stream_config,
    stream_decoder,
    table_decoder,
)

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


def copied(seen: list[list[tuple[int, int]]]) -> list[int]:
    """Return the steps after which a buffer is elsewhere, and not because it has grown."""
    return [
        step
        for step, (before, after) in enumerate(itertools.pairwise(seen[1:]))
        if any(a != b and a[1] == b[1] for a, b in zip(before, after, strict=True))
    ]


def decoded(
    streams: Streams, config: DecodeConfig, cache: KVCache, tokens: int
) -> tuple[list[list[tuple[int, int]]], int]:
    """Return where the buffers were after each step, and how many paths lay apart.

    Looked at when a step has been read and drafts: to look is to wait, and would hurry later ones.
    """
    apart, seen, read = 0, [], Step.read

    def looking(step: Step) -> Verdict:
        verdict = read(step)
        seen.append(addresses(cache))
        return verdict

    decoder = table_decoder(streams, config, keep_drafts=True)
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, 64, 50)]
    decoder.token_sampler.history[:] = prompt
    decoder.prefill(prompt[:-1], cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "read", looking)
        for result in decoder.steps(prompt[-1], cache, MaxTokens(tokens)):
            assert result.draft is not None
            apart += result.draft.accepted != list(range(len(result.tokens)))
    return seen, apart


@pytest.mark.parametrize("kind", list(CACHES))
@pytest.mark.parametrize("setting", [*SETTINGS, "shared"])
def test_buffers_stay_where_they_are(kind: str, setting: str) -> None:
    """Also where the accepted path lay apart, and its rows had to be brought together."""
    shared = setting == "shared"
    streams = streams_for(kind, "shared" if shared else "lossless")
    config = SETTINGS["inline" if shared else setting]
    cache = streams.backbone.new_cache(CACHES[kind], drop=1000)
    seen, apart = decoded(streams, config, cache, 120)
    if setting != "chain":
        assert apart > 3
    if kind == "rotating":
        assert any(isinstance(layer, RotatingLayer) for layer in cache.layers)
    assert copied(seen) == []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold what attention reads until the report has been read, as a GPU's command buffers do.

    They run behind the host, about ten of them or half of a model; a buffer that is held cannot be
    updated in place. What a pass reads after the report is not held here.
    """
    held: list[object] = []
    attend, read = attention._attention, StepReport.read

    def holding(queries: mx.array, keys: object, values: object, **named: object) -> mx.array:
        held.append((keys, values))
        return attend(queries, keys, values, **named)

    def freeing(report: StepReport) -> list[Verdict]:
        verdicts = read(report)
        held.clear()
        return verdicts

    monkeypatch.setattr(attention, "_attention", holding)
    monkeypatch.setattr(StepReport, "read", freeing)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", list(CACHES))
@pytest.mark.parametrize("setting", ["chain", "deferred", "pruned"])
def test_deferred_streams_copy_no_large_buffers_on_a_gpu(
    kind: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = streams_for(kind)
    small = streams.backbone.new_cache(CACHES[kind], drop=1000)
    assert len(copied(decoded(streams, SETTINGS[setting], small, 60)[0])) > 10
    monkeypatch.setattr(step_module, "REWRITTEN_AT_ONCE", 1000)
    large = streams.backbone.new_cache(CACHES[kind], drop=1000)
    assert copied(decoded(streams, SETTINGS[setting], large, 60)[0]) == []


@pytest.mark.parametrize("setting", ["chain", "deferred", "pruned"])
def test_deferred_streams_never_make_a_buffer_grow_once_more(setting: str) -> None:
    """They stand behind the text for a moment: it grows as often as without, and never holds them."""
    streams = streams_for("plain")
    cache = streams.backbone.new_cache()
    seen, _ = decoded(streams, SETTINGS[setting], cache, 700)
    sizes = [[rows for _, rows in buffers] for buffers in seen]
    grown = [
        sum(a != b for a, b in itertools.pairwise(of_one)) for of_one in zip(*sizes, strict=True)
    ]
    assert set(grown) == {cache.length // GROWTH}
    assert {rows for of_step in sizes for rows in of_step} == {256, 512, 768}


def peak_over_base(decoder: DraftDecoder, context: int = 4096) -> tuple[int, int]:
    """Return the bytes that steps behind a context take for a while, and the paths apart."""
    cache, decoder.keep_drafts = decoder.stepper.drafter.backbone.new_cache(), True
    for layer in cache.layers:  # a text that says nothing, so that the table is often right
        layer.write(0, *[mx.zeros((1, 4, context, 8))] * 2)
    cache.advance(context)
    apart = base = 0
    for step, result in enumerate(decoder.steps(5, cache, MaxTokens(36))):
        assert result.draft is not None
        apart += result.draft.accepted != list(range(len(result.tokens)))
        if step == 1:
            mx.eval(cache.arrays)
            mx.reset_peak_memory()
            base = mx.get_active_memory()
    return mx.get_peak_memory() - base, apart


@pytest.mark.parametrize("schedule", ["deferred", "inline"])
def test_a_tree_takes_no_more_memory_than_a_chain_of_as_many_rows(schedule: str) -> None:
    model = small_model(layers=6, vocab=64, attention=0.1, seed=3, num_key_value_heads=4)
    streams = random_streams(model, stream_config(num_streams=15), scale=0.05)
    trees = (TreeSpec(kind="chain", branching=1), TreeSpec(rows=16))
    configs = [DecodeConfig(tree, schedule=schedule) for tree in trees]  # type: ignore[arg-type]
    (chain, _), (tree, apart) = (peak_over_base(table_decoder(streams, c)) for c in configs)
    assert apart > 2
    assert tree <= 1.5 * chain


def without_scores(q: mx.array, k: mx.array, v: mx.array, **_: object) -> mx.array:
    """Stand in for fused attention, which keeps no scores in memory; on the CPU there is none."""
    return q + 0 * (k[:, :1, :1] + v[:, :1, :1])


@pytest.mark.parametrize("context", [4096, 16384])
def test_a_row_takes_its_logits_and_its_keys_and_values(
    context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So much more do 16 rows take than a chain's 5, and a few bytes for each key in masks."""
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", without_scores)
    layers, vocab = 6, 8192
    model = small_model(layers=layers, vocab=vocab, seed=3, num_key_value_heads=4)
    streams = random_streams(model, stream_config(num_streams=4), scale=0.05)
    trees = (TreeSpec(kind="chain", branching=1), TreeSpec(rows=16))
    configs = [DecodeConfig(tree, schedule="deferred") for tree in trees]
    chain, tree = (peak_over_base(stream_decoder(streams, c), context)[0] for c in configs)
    row = 4 * vocab + layers * 2 * 4 * 4 * 8
    assert tree - chain <= 11 * (1.1 * row + 3 * context)
    assert tree >= 16 * 4 * vocab


def decoded_together(mode: str) -> list[list[tuple[int, int]]]:
    """Return where the buffers of a batch of three were after each step."""
    decoder = with_batch_table(BatchDecoder(as_model(streams_for("plain", mode))))
    for seed in range(3):
        decoder.add([int(t) for t in np.random.default_rng(seed).integers(0, 64, 10 + seed)])
    seen, accepted, read = [], 0, BatchStep.read

    def looking(step: BatchStep) -> list[Verdict]:
        verdicts = read(step)
        seen.append(addresses(decoder.cache))
        return verdicts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchStep, "read", looking)
        for _ in range(40):
            for _, result, _ in decoder.step():
                assert result is not None
                accepted += result.accepted
    assert accepted > 20
    return seen


@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_a_batch_is_updated_in_place(mode: str) -> None:
    assert copied(decoded_together(mode)) == []


@pytest.mark.usefixtures("gpu")
def test_a_large_batch_copies_nothing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(copied(decoded_together("lossless"))) > 20
    monkeypatch.setattr(batch_step, "REWRITTEN_AT_ONCE", 1000)
    assert copied(decoded_together("lossless")) == []
