from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from mlx_lm.models.cache import ChunkedKVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.models.cache import KVCache as MlxLmCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream import generate
from mlx_specstream.config import DecodeConfig, PruneSpec, TreeSpec
from mlx_specstream.errors import OptionError
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import GROWTH, KVCache, LayerKV, LayerPass, from_mlx_lm, to_mlx_lm
from mlx_specstream.speculation.plain import PlainDecoder
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from tests.support import tiny
from tests.support.engine import (
    Decoded,
    committed_rows,
    decode,
    examples,
    plain,
    random_streams,
    small_model,
    stream_config,
    stream_decoder,
    table_decoder,
)


def rows_of(streams: Streams, text: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the cache of a fresh prefill of `text`, as mlx-lm itself computes it."""
    caches = make_prompt_cache(streams.backbone.model)
    streams.backbone.model(mx.array([text]), cache=caches)
    return [
        (np.array(c.keys[:, :, : c.offset]), np.array(c.values[:, :, : c.offset])) for c in caches
    ]


def assert_cache_follows(run: Decoded, streams: Streams, prompt: list[int]) -> None:
    """Compare the rows after every step with those of the text so far.

    Rows of a text do not depend on what comes later, so one reference serves all steps. In
    shared mode main rows see their streams, which a prefill has not: plain steps are compared.
    """
    if streams.shared:
        other = plain(streams, prompt, len(run.tokens))
        assert other.tokens == run.tokens
        expected = committed_rows(other.cache)
    else:
        expected = rows_of(streams, prompt + run.tokens[:-1])
    length = len(prompt) - 1
    for step, snapshot in zip(run.steps, run.snapshots, strict=True):
        length += len(step.tokens)
        for (keys, values), (wanted_keys, wanted_values) in zip(snapshot, expected, strict=True):
            assert keys.shape[2] == length
            np.testing.assert_allclose(keys, wanted_keys[:, :, :length], atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(values, wanted_values[:, :, :length], atol=1e-4, rtol=1e-4)
    assert run.cache.length == length


trees = st.one_of(
    st.builds(TreeSpec, kind=st.just("chain"), branching=st.just(1), depth=st.integers(0, 3)),
    st.builds(TreeSpec, kind=st.just("best"), rows=st.integers(1, 20), branching=st.integers(1, 8)),
    st.builds(TreeSpec, kind=st.just("product"), branching=st.integers(1, 3), depth=st.just(2)),
)
prunes = st.one_of(
    st.none(),
    st.builds(PruneSpec, keep=st.integers(1, 12), threshold=st.sampled_from([0.0, 0.02, 0.2])),
)


@examples(40)
@given(
    trees,
    prunes,
    st.sampled_from(["lossless", "shared"]),
    st.sampled_from(["inline", "deferred"]),
    st.integers(1, 12),
    st.integers(0, 5),
    st.booleans(),
)
def test_after_every_step_the_cache_is_a_fresh_prefill(
    tree: TreeSpec,
    prune: PruneSpec | None,
    mode: str,
    schedule: str,
    prompt_length: int,
    seed: int,
    table: bool,
) -> None:
    model = small_model(layers=4, seed=seed, attention=0.5)
    streams = random_streams(model, stream_config(mode=mode, value_rotation=0.1), seed)
    config = DecodeConfig(tree, prune, "inline" if mode == "shared" else schedule)
    make = table_decoder if table else stream_decoder
    prompt = [int(t) for t in np.random.default_rng(seed).integers(0, 12, prompt_length)]
    run = decode(make(streams, config), prompt, 16, snapshots=True)
    event(f"accepted {min(3, max(step.accepted for step in run.steps))} or more at once")
    assert_cache_follows(run, streams, prompt)


@pytest.mark.parametrize("prompt_length", [GROWTH - 20, GROWTH - 1, GROWTH, GROWTH + 1])
@pytest.mark.parametrize("schedule", ["inline", "deferred"])
def test_growth_over_the_boundary(prompt_length: int, schedule: str) -> None:
    streams = random_streams(small_model(layers=3, seed=1), stream_config(), 1)
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, 12, prompt_length)]
    config = DecodeConfig(TreeSpec(rows=8), PruneSpec(keep=6), schedule)
    run = decode(table_decoder(streams, config), prompt, 30, snapshots=True, chunk=100)
    assert run.accepted > 0
    assert_cache_follows(run, streams, prompt)
    assert all(array.shape[2] % GROWTH == 0 for array in run.cache.arrays)


def test_rewound_text_decodes_as_if_it_had_been_that_long() -> None:
    streams = random_streams(small_model(layers=3, seed=1), stream_config(), 1)
    config = DecodeConfig(TreeSpec(rows=8))
    prompt = [1, 2, 3, 4]
    first = decode(table_decoder(streams, config), prompt, 20)
    first.cache.rewind(3)
    again = decode(table_decoder(streams, config), [4], 20, cache=first.cache)
    assert again.tokens == first.tokens
    # Cut inside an accepted path, then go on from there.
    long = next(n for n, step in enumerate(first.steps) if step.accepted)
    cut = sum(len(step.tokens) for step in first.steps[: long + 1]) - 1
    again.cache.rewind(len(prompt) - 1 + cut)
    rest = decode(table_decoder(streams, config), [first.tokens[cut - 1]], 10, cache=again.cache)
    assert rest.tokens[:5] == first.tokens[cut : cut + 5]
    for length in (-1, rest.cache.length + 1):
        with pytest.raises(OptionError, match=f"cannot rewind the KV cache to {length} rows"):
            rest.cache.rewind(length)


def test_to_and_from_mlx_lm() -> None:
    model = small_model(layers=3, seed=1)
    text = [1, 5, 2, 9, 4, 4]
    caches = make_prompt_cache(model)
    model(mx.array([text]), cache=caches)
    ours = from_mlx_lm(caches)
    assert ours.length == 6
    streams = random_streams(model, stream_config(), 1)
    config = DecodeConfig(TreeSpec(rows=8))
    continued = decode(table_decoder(streams, config), [3], 12, cache=ours)
    assert continued.tokens == plain(streams, [*text, 3], 12).tokens[: len(continued.tokens)]
    assert all(cache.offset == 6 for cache in caches), "the caller's cache must not move"

    theirs = make_prompt_cache(model)
    model(mx.array([[7, 7]]), cache=theirs)  # forgotten
    to_mlx_lm(ours, theirs)
    assert {cache.offset for cache in theirs} == {ours.length}
    seen = [*text, 3, *continued.tokens]
    found = model(mx.array([seen[-1:]]), cache=theirs)[0, -1]
    np.testing.assert_allclose(np.array(found), np.array(model(mx.array([seen]))[0, -1]), atol=1e-4)
    # mlx-lm goes on writing; our buffers must not see it, nor theirs ours.
    rows = committed_rows(ours)
    model(mx.array([[1, 2, 3]]), cache=theirs)
    for (a, b), (c, d) in zip(rows, committed_rows(ours), strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)


def test_empty_caches_pass_both_ways() -> None:
    ours = from_mlx_lm([MlxLmCache() for _ in range(3)])
    assert ours.length == 0
    theirs = [MlxLmCache() for _ in range(3)]
    model = small_model(layers=3)
    model(mx.array([[7, 7]]), cache=theirs)
    to_mlx_lm(ours, theirs)
    assert {cache.offset for cache in theirs} == {0}
    expected = model(mx.array([[1, 2]]))
    assert mx.allclose(model(mx.array([[1, 2]]), cache=theirs), expected, atol=1e-5)


def test_other_caches_are_refused() -> None:
    uneven = [MlxLmCache(), MlxLmCache()]
    uneven[0].update_and_fetch(mx.zeros((1, 1, 2, 4)), mx.zeros((1, 1, 2, 4)))
    for caches in ([ChunkedKVCache(8)], [object()], uneven, []):
        with pytest.raises(OptionError, match="make_prompt_cache"):
            from_mlx_lm(caches)
    for caches in ([RotatingKVCache(max_size=8)] * 3, [MlxLmCache()]):
        with pytest.raises(OptionError, match="make_prompt_cache"):
            to_mlx_lm(KVCache(3), caches)


def test_rows_are_gathered_and_scratch_is_overwritten() -> None:
    layer = LayerKV()
    values = mx.arange(8, dtype=mx.float32).reshape(1, 1, 8, 1)
    layer.write(0, values, 10 + values)
    layer.new_rows = (values, 10 + values)
    layer.gather(2, mx.array([3, 5, 5]))
    assert layer.read(8)[0].flatten().tolist() == [0, 1, 3, 5, 5, 5, 6, 7]
    assert layer.read(8)[1].flatten().tolist() == [10, 11, 13, 15, 15, 15, 16, 17]
    turned = LayerPass(layer, 4, 0, lambda v: -v)
    keys, values = turned.update_and_fetch(values[:, :, :2], values[:, :, :2])
    assert keys.flatten().tolist() == [0, 1, 3, 5, 0, 1]
    assert values.flatten().tolist() == [10, 11, 13, 15, 0, -1]


def test_sizes() -> None:
    cache = KVCache(2)
    assert (cache.nbytes, cache.arrays) == (0, [])
    backbone = Backbone(small_model(layers=2))
    decode(PlainDecoder(backbone, TokenSampler()), [1, 2], 3, cache=cache)
    assert cache.length == 4
    assert cache.nbytes == 2 * 2 * GROWTH * 2 * 8 * 4


@pytest.mark.parametrize("schedule", ["inline", "deferred"])
@pytest.mark.parametrize(
    "config",
    [DecodeConfig(TreeSpec(rows=3)), DecodeConfig(TreeSpec(rows=9), PruneSpec(keep=3))],
    ids=["few rows", "few rows kept"],
)
def test_trees_with_fewer_rows_than_levels(config: DecodeConfig, schedule: str) -> None:
    """A path then has fewer places than the tree's depth says."""
    model = small_model(layers=3, seed=2)
    config = DecodeConfig(config.tree, config.prune, schedule)
    streams = random_streams(model, stream_config(num_streams=5), 2)
    paths = set()
    for first in range(3):
        run = decode(
            stream_decoder(streams, config, keep_drafts=True), [first, 2], 12, snapshots=True
        )
        paths |= {tuple(step.draft.accepted) for step in run.steps if step.draft is not None}
        assert_cache_follows(run, streams, [first, 2])
    assert len({len(path) for path in paths}) > 1
    assert any(path != tuple(range(len(path))) for path in paths), paths


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", [make_prompt_cache, lambda model: make_prompt_cache(model, 32)])
def test_another_models_rows_are_refused(
    heads: int, kind: Callable[[nn.Module], list[Any]], byte_tokenizer: TokenizerWrapper
) -> None:
    """Of one head, MLX would write the same row for every head and say nothing."""
    made, other = tiny.tiny_model(), tiny.tiny_model(num_key_value_heads=heads)
    cache = kind(made)
    generate(made, byte_tokenizer, [1, 2, 3], max_tokens=2, prompt_cache=cache)
    said = f"rows of 2 heads and width 16, the model makes {heads} of 16"
    with pytest.raises(OptionError, match=said):
        generate(other, byte_tokenizer, [4], max_tokens=2, prompt_cache=cache)
