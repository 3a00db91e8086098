"""Models with layers that keep a state, qwen3_next and qwen3_5: chains, states, rewinding."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_specstream.config import CacheConfig, DecodeConfig, StreamConfig, TreeSpec
from mlx_specstream.errors import ModelError, OptionError, StreamsError
from mlx_specstream.generation.generate import stream_generate
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache, StateLayer, from_mlx_lm, to_mlx_lm
from mlx_specstream.model.masks import RowMask
from mlx_specstream.model.probe import check_backbone
from mlx_specstream.planner.adaptive import AutoDecoder
from mlx_specstream.planner.lookup import LookUpPlanner
from mlx_specstream.speculation.decode import Decoder, decode
from mlx_specstream.speculation.drafters import NoDrafter, StreamDrafter
from mlx_specstream.speculation.drafters.lookup import FileIndex, LookUp
from mlx_specstream.speculation.drafting import DraftDecoder, StreamDecoder, chains_only
from mlx_specstream.speculation.result import MaxTokens
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.tree import chain
from tests.support import tiny
from tests.support.against_mlx_lm import compare_with_mlx_lm, random_streams
from tests.support.engine import mlx_lm_tokens
from tests.support.tiny_models import tiny_random_model

HYBRIDS = ["qwen3_5", "qwen3_next"]
PROMPT = [3, 7, 1, 9, 4, 2, 8]
LOSSLESS = StreamConfig(num_streams=3, num_msa_layers=2)


@lru_cache(maxsize=4)
def backbone_of(name: str, **overrides: Any) -> Backbone:
    return Backbone(tiny_random_model(name, **overrides))


def arrays_of(model: nn.Module, tokens: list[int]) -> list[np.ndarray]:
    """Return mlx-lm's own states and rows after a text, computed in one go."""
    caches = make_prompt_cache(model)
    model(mx.array(tokens)[None], cache=caches)
    found = []
    for cache in caches:
        rows = getattr(cache, "keys_and_values", lambda cache=cache: cache.state)  # mlx-lm 0.31
        pair = cache.cache if hasattr(cache, "cache") else rows()
        found += [np.array(array) for array in pair]
    return found


def arrays_in(cache: KVCache, length: int) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for layer in cache.layers:
        pair = layer.after(length) if isinstance(layer, StateLayer) else layer.read(length)
        found += [np.array(array) for array in pair or []]
    return found


def same(cache: KVCache, model: nn.Module, tokens: list[int]) -> None:
    expected = arrays_of(model, tokens)
    found = arrays_in(cache, len(tokens))
    assert len(found) == len(expected) > 4
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs[..., : ours.shape[-2], :], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", HYBRIDS)
def test_decodes_as_mlx_lm(name: str) -> None:
    tried = compare_with_mlx_lm(tiny_random_model(name), PROMPT, 30)
    assert tried.differs is None
    assert tried.accepted > 0


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_pattern_of_acceptance_leaves_the_state_of_a_fresh_prefill(name: str) -> None:
    backbone = backbone_of(name)
    check_backbone(backbone)
    cache, rng = backbone.new_cache(), np.random.default_rng(0)
    text = [int(t) for t in rng.integers(0, 12, 5)]
    backbone.forward(mx.array(text), cache)
    cache.advance(5)
    for accepted in [0, 3, 1, 2, 3, 0]:
        drafts = [int(t) for t in rng.integers(0, 12, 4)]
        positions = cache.length + mx.arange(4, dtype=mx.int32)
        keys = mx.arange(cache.length + 4, dtype=mx.int32)
        mask = RowMask(keys[None] <= positions[:, None], lambda p=positions, k=keys: (p, k))
        every = range(backbone.num_layers)
        hidden = backbone.embed(mx.array(drafts))
        hidden = backbone.run(hidden, every, cache, cache.length, positions, mask)
        logits = np.array(backbone.logits(hidden))
        expected = np.array(backbone.model(mx.array([*text, *drafts])[None])[0, -4:])
        np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=1e-3)
        text += drafts[: accepted + 1]
        cache.advance(accepted + 1)
        same(cache, backbone.model, text)


def test_streams_continue_from_the_accepted_row_and_leave_nothing() -> None:
    """The streams of row i after a chain: what they are if the text ends there."""
    backbone = backbone_of("qwen3_5")
    streams = random_streams(backbone)
    chains = TreeSpec(kind="chain", branching=1, depth=3)
    decoder = StreamDecoder(streams, DecodeConfig(chains), TokenSampler())
    drafter = decoder.drafter
    assert isinstance(drafter, StreamDrafter)

    def states(text: list[int], drafts: list[int], node: int) -> np.ndarray:
        cache = backbone.new_cache()
        backbone.forward(mx.array(text), cache)
        cache.advance(len(text))
        verified = drafter.verify(chain(mx.array(drafts)), cache)
        before = arrays_in(cache, len(text) + 1)
        found = np.array(drafter.stream_states(verified, mx.array(node), mx.array(0), cache))
        for old, new in zip(before, arrays_in(cache, len(text) + 1), strict=True):
            np.testing.assert_array_equal(old, new)
        return found

    text, drafts = [1, 2, 3, 4], [5, 6, 7]
    together = states(text, drafts, 1)
    alone = states([*text, 5], [6], 0)
    np.testing.assert_allclose(together, alone, atol=1e-3, rtol=1e-3)
    assert np.abs(together - states(text, drafts, 2)).max() > 1e-2


def answer(
    model: StreamModel, ids: list[int], cache: Any = None, count: int = 12, stop_after: int = 0
) -> list[int]:
    tokens = []
    responses = stream_generate(
        model, tiny.byte_tokenizer(), ids, max_tokens=count, prompt_cache=cache
    )
    for response in responses:
        tokens.append(response.token)
        if len(tokens) == stop_after:
            responses.close()
    return tokens


@pytest.fixture(scope="module")
def with_streams() -> StreamModel:
    model = tiny_random_model("qwen3_5", vocab_size=256)
    backbone = Backbone(model)
    return StreamModel(model, backbone, random_streams(backbone))


def test_turns_continue_and_rewind(with_streams: StreamModel) -> None:
    model, backbone = with_streams.model, with_streams.backbone
    cache = backbone.new_cache()
    first = answer(with_streams, PROMPT, cache)
    assert first == mlx_lm_tokens(model, PROMPT, 12)
    same(cache, model, [*PROMPT, *first[:-1]])
    # A second turn continues; a third one edits it and begins again where that is possible.
    turn = [first[-1], 40, 41]
    text = [*PROMPT, *first[:-1], *turn]
    marked = cache.length
    assert answer(with_streams, turn, cache, stop_after=5) == mlx_lm_tokens(model, text, 5)
    same(cache, model, [*text, *mlx_lm_tokens(model, text, 5)[:-1]])
    assert cache.can_rewind(marked)
    assert not cache.can_rewind(3)
    assert cache.nearest(3) == 0
    with pytest.raises(OptionError, match="states are overwritten"):
        cache.rewind(3)
    cache.rewind(cache.nearest(marked + 1))
    edited = [first[-1], 77]
    found = answer(with_streams, [*text[cache.length : marked], *edited], cache)
    assert found == mlx_lm_tokens(model, [*PROMPT, *first[:-1], *edited], 12)


def test_a_lent_cache_of_mlx_lm(with_streams: StreamModel) -> None:
    model = with_streams.model
    lent = make_prompt_cache(model)
    first = answer(with_streams, PROMPT, lent)
    assert first == mlx_lm_tokens(model, PROMPT, 12)
    text = [*PROMPT, *first]
    expected = mlx_lm_tokens(model, [*text, 50], 6)
    assert mlx_lm_tokens(model, [50], 6, prompt_cache=lent) == expected
    ours = from_mlx_lm(lent)
    assert ours.length == len(text) + 7
    again = make_prompt_cache(model)
    to_mlx_lm(ours, again)
    assert [cache.offset for cache in again if hasattr(cache, "offset")] == [ours.length] * 2


def test_copies_are_on_their_own(with_streams: StreamModel) -> None:
    cache = with_streams.backbone.new_cache()
    first = answer(with_streams, PROMPT, cache)
    copy = cache.copy(cache.length)
    before = arrays_in(copy, copy.length)
    answer(with_streams, [first[-1], 9], cache)
    for old, new in zip(before, arrays_in(copy, copy.length), strict=True):
        np.testing.assert_array_equal(old, new)
    assert cache.fresh().length == 0
    assert isinstance(cache.fresh().layers[0], StateLayer)


def test_trees_become_chains_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    config = chains_only(DecodeConfig(TreeSpec(rows=3)), LOSSLESS, "a_family")
    assert config.tree == TreeSpec(kind="chain", branching=1, depth=2)
    assert "drafts of a a_family model are chains" in caplog.text
    wide = DecodeConfig(TreeSpec(kind="product", branching=4, depth=9))
    assert chains_only(wide, LOSSLESS, "a_family").tree.depth == 3
    alone = DecodeConfig(TreeSpec(rows=1))
    assert chains_only(alone, LOSSLESS, "a_family") == alone


def test_what_states_exclude_is_refused() -> None:
    shared = StreamConfig(num_streams=3, num_msa_layers=2, mode="shared")
    with pytest.raises(StreamsError, match="shared mode cannot be used with a x model"):
        chains_only(DecodeConfig(), shared, "x")
    with pytest.raises(OptionError, match="'inline' cannot be used"):
        chains_only(DecodeConfig(schedule="inline"), LOSSLESS, "x")
    with pytest.raises(OptionError, match="kv_bits"):
        backbone_of("qwen3_5").new_cache(CacheConfig(kv_bits=8))
    backbone = backbone_of("qwen3_5")
    with pytest.raises(ModelError, match=r"backbone.new_cache\(\)"):
        backbone.forward(mx.array([1, 2]), KVCache(backbone.num_layers))


@pytest.mark.parametrize("name", [*HYBRIDS, "granitemoehybrid", "lfm2", "kimi_linear"])
@pytest.mark.parametrize("rows", [0, 8])
def test_look_up_drafts_chains(name: str, rows: int) -> None:
    """Without streams, every step (8 rows) or where it pays: the text is mlx-lm's, states are fresh."""
    backbone = backbone_of(name)
    wanted = mlx_lm_tokens(backbone.model, PROMPT, 24)
    # What will be said stands in a file, once rightly and once with another end.
    files = FileIndex([*PROMPT, *wanted, *PROMPT, *wanted[:5], 0, 0, 0])
    lookup = LookUp(files=files)
    decoder: Decoder = AutoDecoder(
        None,
        DecodeConfig(),
        TokenSampler(),
        None,
        True,
        lookup,
        LookUpPlanner(slope=0.02, clock=None),
        backbone,
    )
    if rows:
        drafter, tree = NoDrafter(backbone), TreeSpec("best", rows=rows)
        decoder = DraftDecoder(drafter, tree, TokenSampler(), keep_drafts=True, lookup=lookup)
    cache = backbone.new_cache()
    criteria, accepted = MaxTokens(24), 0
    for step in decode(decoder, PROMPT, cache, criteria):
        if step.draft is not None:
            nodes = range(len(step.draft.tokens))
            assert step.draft.parents == [max(node - 1, 0) for node in nodes]
        accepted += step.accepted
    assert criteria.tokens[:24] == wanted
    assert accepted > 8
    if name in HYBRIDS:
        same(cache, backbone.model, (PROMPT + criteria.tokens)[: cache.length])
