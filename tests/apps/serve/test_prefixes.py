"""KV caches shared between requests: what is taken is what a fresh prefill gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream import KVCache, StreamModel
from mlx_specstream.apps.prefix import PrefixCache, common_prefix
from mlx_specstream.apps.serve.prefixes import PrefixStore
from tests.support.engine import examples
from tests.support.scripted import assert_holds

IDS = st.lists(st.integers(1, 3), min_size=1, max_size=12)


def filled(model: StreamModel, ids: list[int]) -> PrefixCache:
    cache = PrefixCache(model.backbone.new_cache())
    for _ in model.prefill(ids, cache.kv, 4):
        pass
    cache.settle(ids)
    return cache


@given(IDS, IDS)
def test_common_prefix(one: list[int], other: list[int]) -> None:
    found = common_prefix(one, other)
    assert one[:found] == other[:found]
    assert found == min(len(one), len(other)) or one[found] != other[found]


@examples(20)
@given(st.lists(IDS, min_size=1, max_size=8))
def test_what_is_taken_is_a_fresh_prefill(
    tiny_stream_model: StreamModel, texts: list[list[int]]
) -> None:
    model = tiny_stream_model
    store = PrefixStore(model.backbone.new_cache, 2**30)
    taken = []
    for ids in texts:
        cache = store.take(ids)
        shared = cache.kv.length
        assert cache.tokens == ids[:shared]
        assert shared < len(ids)
        for _ in model.prefill(ids[shared:], cache.kv, 4):
            pass
        cache.settle(ids)
        assert_holds(cache.kv, model, ids)
        taken.append(cache)
        store.put(cache)
    for entry in store.entries:  # nobody wrote into what is stored
        assert_holds(entry.kv, model, entry.tokens)
    best = max(common_prefix(texts[-1], ids) for ids in texts)
    assert store.take(texts[-1]).kv.length == min(best, len(texts[-1]) - 1)


def test_a_copy_leaves_the_stored_text_alone(tiny_stream_model: StreamModel) -> None:
    store = PrefixStore(tiny_stream_model.backbone.new_cache, 2**30)
    store.put(filled(tiny_stream_model, [1, 2, 3, 4]))
    copy = store.take([1, 2, 9, 9])
    assert copy.tokens == [1, 2]
    for _ in tiny_stream_model.prefill([9, 9], copy.kv):
        pass
    (entry,) = store.entries
    assert_holds(entry.kv, tiny_stream_model, [1, 2, 3, 4])


def test_what_continues_a_text_takes_its_cache(tiny_stream_model: StreamModel) -> None:
    store = PrefixStore(tiny_stream_model.backbone.new_cache, 2**30)
    stored = filled(tiny_stream_model, [1, 2, 3])
    store.put(stored)
    assert store.take([1, 2, 3, 4]) is stored
    assert not store.entries


def test_the_bound_holds_and_the_oldest_goes(tiny_stream_model: StreamModel) -> None:
    one = filled(tiny_stream_model, [1, 1])
    store = PrefixStore(tiny_stream_model.backbone.new_cache, 2 * one.kv.nbytes)
    for first in (1, 2):
        store.put(filled(tiny_stream_model, [first] * 2))
    store.take([1, 1, 5])
    store.put(filled(tiny_stream_model, [1, 1, 5]))
    store.put(filled(tiny_stream_model, [3, 3]))
    assert [entry.tokens[0] for entry in store.entries] == [1, 3]
    assert store.nbytes <= store.max_bytes
    nothing = PrefixStore(tiny_stream_model.backbone.new_cache, 0)
    nothing.put(one)
    assert not nothing.entries


def test_a_text_is_stored_once(tiny_stream_model: StreamModel) -> None:
    store = PrefixStore(tiny_stream_model.backbone.new_cache, 2**30)
    for ids in ([1, 2], [1, 2, 3], [1, 2], [1]):
        store.put(filled(tiny_stream_model, ids))
    assert [entry.tokens for entry in store.entries] == [[1, 2, 3]]
    store.put(PrefixCache(KVCache(tiny_stream_model.backbone.num_layers)))
    assert len(store.entries) == 1


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_prefill_goes_chunk_by_chunk(tiny_stream_model: StreamModel, chunk: int) -> None:
    cache = KVCache(tiny_stream_model.backbone.num_layers)
    done = list(tiny_stream_model.prefill([1, 2, 3, 4, 5], cache, chunk))
    assert done == [*range(chunk, 5, chunk), 5]
    assert_holds(cache, tiny_stream_model, [1, 2, 3, 4, 5])
