"""Look-up: where a text's end occurred before, what may follow, and that no text changes by it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_sampler

from mlx_specstream.config import DecodeConfig, TreeSpec, parse_drafts
from mlx_specstream.errors import OptionError
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.drafters import NoDrafter
from mlx_specstream.speculation.drafters.lookup import (
    Continuations,
    FileIndex,
    LookUp,
    looked_up_tree,
    merged_tree,
)
from mlx_specstream.speculation.drafters.lookup.calibration import PRIOR, Calibration, groups
from mlx_specstream.speculation.drafters.lookup.continuations import continuations
from mlx_specstream.speculation.drafters.lookup.merge import DOUBT
from mlx_specstream.speculation.drafters.lookup.text import LONGEST, PLACES, TextIndex
from mlx_specstream.speculation.drafting import DraftDecoder
from mlx_specstream.speculation.result import LOOK_UP, MaxTokens
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.tree import DraftTree, Proposer, build
from tests.reference import tree as reference
from tests.support.engine import (
    Decoded,
    assert_same_text,
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

texts = st.lists(st.integers(0, 3), max_size=40)


def brute(text: Sequence[int]) -> dict[int, int]:
    """Return every place before the last at which some of the text's end stands: its match's length."""
    found = {}
    for place in range(len(text) - 1):
        length = 0
        while length <= place and text[place - length] == text[len(text) - 1 - length]:
            length += 1
        if length:
            found[place] = min(length, LONGEST)
    return found


@examples(200)
@given(texts)
def test_occurrences_are_the_longest_matches(text: list[int]) -> None:
    index = TextIndex()
    index.extend(text)
    wanted = brute(text)
    found = {one.next - 1: one.length for one in index.occurrences()}
    assert len(found) == min(len(wanted), PLACES)
    assert all(wanted[place] == length for place, length in found.items())
    # Every match of 8 or more is preferred to all shorter ones, and the newest of them are found.
    long = sorted((place for place, length in wanted.items() if length >= 8), reverse=True)
    assert set(long[:PLACES]) <= set(found)
    for one in index.occurrences():
        assert one.follows() == text[one.next]


@examples(200)
@given(texts, st.lists(st.tuples(st.integers(0, 40), texts), max_size=4))
def test_a_text_that_shrinks_is_as_if_it_had_never_grown(
    text: list[int], edits: list[tuple[int, list[int]]]
) -> None:
    index = TextIndex(start=5)
    index.extend(text)
    for kept, more in edits:
        index.truncate(5 + kept)
        index.extend(more)
        text = [*text[:kept], *more]
    fresh = TextIndex(start=5)
    fresh.extend(text)
    assert index.tokens == text
    assert index._newest == fresh._newest
    assert index._earlier == fresh._earlier


def test_what_followed_the_end_itself_begins_again() -> None:
    index = TextIndex()
    index.extend([1, 2, 3, 1, 2, 3])
    best = index.occurrences()[0]
    said = []
    for _ in range(7):
        said.append(best.follows())
        best = best.after()
    assert said == [1, 2, 3, 1, 2, 3, 1]


@examples(60)
@given(st.integers(0, 10**6))
def test_files_give_the_places_that_match_furthest(seed: int) -> None:
    random_ = random.Random(seed)
    tokens = [random_.randrange(4) for _ in range(200)]
    text = [random_.randrange(4) for _ in range(20)]
    wanted = brute_in(tokens, text)
    found = FileIndex(tokens).occurrences(text)
    assert all(wanted[one.next - 1] == one.length >= 3 for one in found)
    if found or max(wanted.values(), default=0) >= 3:
        # Neighbours in order of six tokens read backwards: no other matches more of those.
        best = max(min(length, 6) for length in wanted.values())
        assert min(found[0].length, 6) == best


def brute_in(tokens: Sequence[int], text: Sequence[int]) -> dict[int, int]:
    found = {}
    for place in range(len(tokens)):
        length = 0
        most = min(place + 1, len(text))
        while length < most and tokens[place - length] == text[-1 - length]:
            length += 1
        found[place] = length
    return found


def test_the_end_of_a_file_is_followed_by_nothing() -> None:
    files = FileIndex([7, 8, 9, 1, 2, 3])
    lookup = LookUp(Calibration(), files)
    lookup.begin([5, 1, 2, 3], KVCache(1))
    assert not lookup.continuations(5, 5)
    lookup.begin([5, 7, 8, 9], KVCache(1))
    assert lookup.continuations(5, 5).tokens == [1, 2, 3]
    assert FileIndex([]).occurrences([1, 2, 3]) == []


def test_chances_are_learnt_by_kind() -> None:
    index = TextIndex()
    index.extend([1, 2, 3, 4, 5, 9, 1, 2, 3, 4])
    found, calibration = groups(index.occurrences()), Calibration()
    assert [group.counts for group in found] == [{5: 1}]
    assert calibration.chance(found[0].kind) == pytest.approx(PRIOR[3])
    for _ in range(200):
        calibration.learn(found, 5)
    assert calibration.chance(found[0].kind) > 0.9
    for _ in range(400):
        calibration.learn(found, 6)
    assert calibration.chance(found[0].kind) < 0.1
    other = Calibration()
    assert other.chance(found[0].kind) == pytest.approx(PRIOR[3])


def test_longer_matches_are_asked_first_and_leave_the_rest() -> None:
    index = TextIndex()
    index.extend([1, 2, 3, 4, 5, 4, 6, 4, 6, 1, 2, 3, 4])
    found, calibration = groups(index.occurrences()), Calibration()
    assert [group.counts for group in found] == [{5: 1}, {6: 2}]
    chances = dict(calibration.chances(found))
    first, second = (calibration.chance(group.kind) for group in found)
    assert chances == pytest.approx({5: first, 6: (1 - first) * second})


@examples(100)
@given(texts, st.integers(0, 12), st.integers(0, 6), st.booleans())
def test_continuations_are_a_tree_of_what_followed(
    text: list[int], count: int, depth: int, chain: bool
) -> None:
    index = TextIndex()
    index.extend(text)
    found = continuations(index.occurrences(), Calibration(), count, depth, chain=chain)
    assert len(found) <= count
    assert found.chances == sorted(found.chances, reverse=True)
    siblings = list(zip(found.parents, found.tokens, strict=True))
    assert len(set(siblings)) == len(siblings)
    for node, parent in enumerate(found.parents):
        above = 1.0 if parent < 0 else found.chances[parent]
        assert parent < node
        assert found.depths[node] == (1 if parent < 0 else found.depths[parent] + 1) <= depth
        assert found.chances[node] == pytest.approx(above * found.given[node])
    for parent in {-1, *range(len(found))}:
        children = [n for n in range(len(found)) if found.parents[n] == parent]
        assert sum(found.given[n] for n in children) <= 1 + 1e-9
        assert not chain or len(children) <= 1


def paths_of(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """Return the score of every path of tokens in a tree that may be accepted."""
    assert tree.scores is not None
    paths = reference.paths(tree.tokens.tolist(), tree.parents.tolist())  # type: ignore[arg-type]
    alive = [True] * len(paths) if tree.alive is None else tree.alive.tolist()
    kept = zip(paths, tree.scores.tolist(), alive, strict=True)  # type: ignore[arg-type]
    return {path: score for path, score, lives in kept if lives}


def found_in(text: Sequence[int], count: int) -> Continuations:
    index = TextIndex()
    index.extend(text)
    return continuations(index.occurrences(), Calibration(), count, count)


def proposer_of(seed: int, levels: int, vocab: int, width: int) -> Proposer:
    """Return candidates that depend on level and parent."""
    rng = np.random.default_rng(seed)
    logits = mx.array(rng.normal(size=(levels, vocab, vocab)).astype(np.float32) * 2)
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.argsort(-log_probs, axis=-1)[..., :width].astype(mx.int32)
    values = mx.take_along_axis(log_probs, ids, axis=-1)
    return lambda level, parents, *_: (ids[level][parents], values[level][parents])


def merged_scores(
    propose: Proposer, levels: int, found: Continuations, root: int, most: int
) -> dict[tuple[int, ...], float]:
    """Return every path's log-probability up to a depth by the rule of `merge.py`, slowly."""
    below: dict[int, dict[int, int]] = {}
    for node, parent in enumerate(found.parents):
        below.setdefault(parent, {})[found.tokens[node]] = node
    scores: dict[tuple[int, ...], float] = {(root,): 0.0}

    def walk(path: tuple[int, ...], node: int | None, score: float) -> None:
        level = len(path) - 1
        if level == most:
            return
        chances: dict[int, float] = {}
        own = {} if node is None else below.get(node, {})
        given = {token: found.given[child] for token, child in own.items()}
        if level < levels:
            ids, values = propose(level, mx.array([path[-1]]), mx.array([0]), mx.array([0]))
            theirs = dict(zip(ids[0].tolist(), values[0].tolist(), strict=True))  # type: ignore[arg-type]
            best, least = max(theirs.values()), min(theirs.values())
            for token, chance in given.items():  # believed less if the drafter is of another mind
                odds = chance / (1 - chance) * math.exp(DOUBT * (theirs.get(token, least) - best))
                given[token] = odds / (1 + odds)
            rest = max(1 - sum(given.values()), 1e-6)
            chances = {token: rest * math.exp(value) for token, value in theirs.items()}
        for token, chance in given.items():
            chances[token] = chances.get(token, 0.0) + chance
        for token, chance in chances.items():
            longer = (*path, token)
            scores[longer] = score + math.log(chance) - 1e-4
            walk(longer, own.get(token), scores[longer])

    walk((root,), -1, 0.0)
    return scores


@examples(80)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 5), min_size=4, max_size=30),
    st.integers(1, 3),
    st.sampled_from([2, 4, 6, 9, 16]),
    st.integers(1, 6),
)
def test_a_merged_tree_holds_the_best_of_both(
    seed: int, text: list[int], levels: int, rows: int, width: int
) -> None:
    found = found_in(text, rows - 1)
    if not found:
        return
    propose, spec = proposer_of(seed, levels, 6, width), TreeSpec("best", rows=rows)
    root, before = mx.array(text[-1]), mx.array(0)
    tree = merged_tree(root, spec, levels, propose, before, found)
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    depths = tree.depths.tolist()
    for node in range(1, len(tokens)):  # type: ignore[arg-type]
        assert parents[node] < node  # type: ignore[index, operator]
        lives = tree.alive is None or tree.alive[node].item()
        assert not lives or depths[node] == depths[parents[node]] + 1 <= tree.depth  # type: ignore[index, operator]
    got = paths_of(tree)
    wanted = merged_scores(propose, levels, found, text[-1], max(levels, *found.depths))
    best = sorted(wanted.values(), reverse=True)[: len(got)]
    assert sorted(got.values(), reverse=True) == pytest.approx(best, abs=1e-3)
    assert all(score == pytest.approx(wanted[path], abs=1e-3) for path, score in got.items())
    assert len(got) == min(rows, len(wanted))


def test_without_continuations_of_its_own_a_merged_tree_is_the_drafters() -> None:
    """What look-up is nearly sure of must not push out what hangs elsewhere: only probability counts."""
    propose, spec = proposer_of(3, 3, 6, 4), TreeSpec("best", rows=9)
    rare = Continuations([5], [-1], [1], [1e-9], [1e-9])
    tree = merged_tree(mx.array(2), spec, 3, propose, mx.array(0), rare)
    alone = build(mx.array(2), spec, 3, propose, mx.array(0))
    assert paths_of(tree).keys() == paths_of(alone).keys()
    assert tree.looked_up is not None
    assert not mx.any(tree.looked_up).item()


def test_a_long_match_goes_on_below_the_drafters_last_level() -> None:
    found = found_in([*range(6), *range(3)], 5)  # after 0 1 2: 3 4 5 0 1
    propose = proposer_of(1, 2, 6, 3)
    tree = merged_tree(mx.array(2), TreeSpec("best", rows=16), 2, propose, mx.array(1), found)
    assert tree.depth == 5
    assert (2, 3, 4, 5, 0, 1) in paths_of(tree)
    alone = looked_up_tree(mx.array(2), found)
    assert list(paths_of(alone)) == [
        (2,),
        (2, 3),
        (2, 3, 4),
        (2, 3, 4, 5),
        (2, 3, 4, 5, 0),
        (2, 3, 4, 5, 0, 1),
    ]


def repetitive(seed: int, vocab: int) -> list[int]:
    """Return a prompt that quotes itself."""
    rng = random.Random(seed)
    first = [rng.randrange(vocab) for _ in range(rng.randrange(4, 16))]
    return [*first, *first[: rng.randrange(2, len(first) + 1)], *first[:3]]


def alone_decoder(backbone: Backbone, rows: int, token_sampler: TokenSampler) -> DraftDecoder:
    return DraftDecoder(
        NoDrafter(backbone),
        TreeSpec("best", rows=rows),
        token_sampler,
        keep_drafts=True,
        lookup=LookUp.of(backbone),
    )


CONFIGS = ("8", "8 inline", "13:6", "8 inline:2", "chain3", "chain", "3^2", "3", "24")


@examples(40)
@given(st.data())
def test_with_look_up_the_text_is_the_plain_one(data: st.DataObject) -> None:
    """Any tree, schedule, model and way of drawing; caches equal a fresh prefill after every step."""
    draw = data.draw
    family, seed = draw(st.sampled_from(["llama", "qwen3"])), draw(st.integers(0, 5))
    vocab = draw(st.sampled_from([12, 64]))
    model = small_model(family, draw(st.integers(3, 4)), vocab, seed, attention=0.4)
    shared = draw(st.booleans())
    streams = random_streams(
        model, stream_config(mode="shared" if shared else "lossless"), seed=seed
    )
    config = DecodeConfig.parse(draw(st.sampled_from(CONFIGS)))
    if shared:
        config = DecodeConfig(config.tree)
    sampler = make_sampler(0.8) if draw(st.booleans()) else None
    prompt = repetitive(seed, vocab)
    make = draw(st.sampled_from([stream_decoder, table_decoder]))
    decoder = make(
        streams,
        config,
        token_sampler=TokenSampler(sampler, seed=seed),
        keep_drafts=True,
        lookup=LookUp.of(streams.backbone),
    )
    wanted = plain(streams, prompt, 30, token_sampler=TokenSampler(sampler, seed=seed))
    run = decode(decoder, prompt, 30, snapshots=not shared)
    compare(run, wanted, sampler is None)
    if not shared:
        assert_rows_are_fresh(run, prompt, streams.backbone)


def compare(run: Decoded, wanted: Decoded, greedy: bool) -> None:
    if greedy:
        assert_same_text(run.tokens, wanted)
    else:
        assert run.tokens[:30] == wanted.tokens[:30]
    for step in run.steps:
        assert len(step.origins) == len(step.tokens)
        assert step.origins[-1] == 0


def assert_rows_are_fresh(run: Decoded, prompt: list[int], backbone: Backbone) -> None:
    fresh = KVCache(backbone.num_layers)
    text = [*prompt, *run.tokens][: run.cache.length]
    backbone.forward(mx.array(text), fresh)
    fresh.advance(len(text))
    rows = committed_rows(fresh)
    for snapshot in run.snapshots:
        for (k, v), (wanted_k, wanted_v) in zip(snapshot, rows, strict=True):
            length = k.shape[2]
            np.testing.assert_allclose(k, wanted_k[:, :, :length], atol=1e-4)
            np.testing.assert_allclose(v, wanted_v[:, :, :length], atol=1e-4)


@pytest.mark.parametrize("rows", [2, 6, 16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_look_up_alone_needs_no_streams(family: str, rows: int) -> None:
    accepted = 0
    for seed in range(4):
        backbone = Backbone(small_model(family, vocab=12, seed=seed, attention=0.4))
        prompt = repetitive(seed, 12)
        streams = random_streams(backbone.model, stream_config())
        run = decode(alone_decoder(backbone, rows, TokenSampler()), prompt, 40, snapshots=True)
        assert_same_text(run.tokens, plain(streams, prompt, 40))
        assert_rows_are_fresh(run, prompt, backbone)
        accepted += run.accepted
        assert all(o in (0, LOOK_UP) for step in run.steps for o in step.origins)
        assert all(step.drafted <= rows - 1 for step in run.steps)
    assert accepted > 40


def test_a_tree_without_look_up_is_left_as_it_is() -> None:
    """Nothing found, nothing changed: bit for bit the tree that the drafter built."""
    streams = random_streams(small_model(vocab=64, attention=0.3), stream_config())
    prompt = list(range(20))
    decoder = stream_decoder(streams, DecodeConfig.parse("8"), lookup=LookUp.of(streams.backbone))
    cache = KVCache(streams.backbone.num_layers)
    decoder.prefill(prompt[:-1], cache)
    decoder.begin(prompt[-1:], cache)
    step = decoder.first_step(prompt[-1], cache)
    step.schedule()
    result = decoder.finish(step, cache)
    decoder.lookup.text.truncate(0)  # type: ignore[union-attr]
    decoder.lookup._found = None  # type: ignore[union-attr]
    following = decoder.next_step(step, None, result, cache)
    assert following.tree is step.next_tree


def test_a_conversation_remembers_what_was_said_and_forgets_what_was_taken_back() -> None:
    cache = KVCache(2)
    lookup = LookUp()
    lookup.begin([1, 2, 3], cache)
    lookup.take([4, 5])
    cache.length = 4  # 1 2 3 4 are in it, 5 is the next prompt's first
    lookup.begin([5, 6, 1, 2], cache)
    lookup.read()
    assert lookup.text.tokens == [1, 2, 3, 4, 5, 6, 1, 2]
    assert lookup.continuations(2, 2).tokens == [3, 4]
    cache.length = 1  # gone back
    lookup.begin([8, 1], cache)
    lookup.read()
    assert lookup.text.tokens == [1, 8, 1]
    cache.length = 9  # some were computed by others
    lookup.begin([7, 7], cache)
    lookup.read()
    assert (lookup.text.start, lookup.text.tokens) == (9, [7, 7])
    other = LookUp(known=[*range(9), 7, 7])
    other.begin([7, 7], cache)
    other.read()
    assert (other.text.start, other.text.tokens) == (0, [*range(9), 7, 7])


def test_what_was_taken_is_learnt_whether_or_not_it_was_drafted() -> None:
    lookup = LookUp()
    lookup.begin([1, 2, 3, 4, 9, 1, 2, 3, 4], KVCache(1))
    kind = groups(lookup.occurrences)[0].kind
    before = lookup.calibration.chance(kind)
    lookup.take([9])
    assert lookup.calibration.chance(kind) > before


def test_words_for_drafts() -> None:
    assert (
        parse_drafts("streams,lookup") == parse_drafts("look-up, streams") == ("streams", "lookup")
    )
    assert parse_drafts("none") == ()
    with pytest.raises(OptionError, match="cannot read the drafts 'medusas'"):
        parse_drafts("medusas")
    with pytest.raises(OptionError, match="drafts come from"):
        DecodeConfig(drafts=("x",))
    auto, fixed = DecodeConfig(), DecodeConfig.parse("8")
    assert (auto.looks_up, fixed.looks_up) == (True, False)
    assert DecodeConfig.of_words("8", drafts="lookup").looks_up
    assert not DecodeConfig.of_words("auto", drafts="streams").looks_up
    assert not DecodeConfig.of_words("auto", drafts="none").uses_streams


def test_steps_stop_in_the_middle_of_what_was_looked_up() -> None:
    """An answer that ends inside an accepted path leaves a text that goes on from there."""
    backbone = Backbone(small_model(vocab=12, attention=0.4))
    prompt, cache = repetitive(1, 12), KVCache(3)
    decoder = alone_decoder(backbone, 16, TokenSampler(history=list(prompt)))
    decoder.prefill(prompt[:-1], cache)
    criteria = MaxTokens(3)
    for _ in decoder.steps(prompt[-1], cache, criteria):
        pass
    cache.cut(len(prompt) + len(criteria.tokens) - 1)
    text = [*prompt, *criteria.tokens]
    again = alone_decoder(backbone, 16, TokenSampler(history=list(text)))
    more = MaxTokens(30)
    for _ in again.steps(text[-1], cache, more):
        pass
    streams = random_streams(backbone.model, stream_config())
    wanted = plain(streams, prompt, 33)
    found = [*criteria.tokens, *more.tokens]
    assert_same_text(found[:33], wanted)
    assert again.lookup is not None
    assert again.lookup.text.tokens[: len(text)] == text
