"""Look-up in batches: every request has its own text looked up, and no text changes by it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_specstream.batch import BatchDecoder, BatchGovernor
from mlx_specstream.batch.chains import looked_up_chains, merged_chains
from mlx_specstream.batch.lookup import PATIENCE, SELDOM
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.errors import OptionError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.cache import KVCache
from mlx_specstream.planner.lookup import MARGIN
from mlx_specstream.speculation.drafters.lookup import Continuations, FileIndex, merged_tree
from mlx_specstream.speculation.result import LOOK_UP
from tests.batch.engine import (
    Request,
    assert_draws_follow,
    assert_fresh,
    finish,
    prompt_of,
    step,
    streamed,
)
from tests.planner.test_lookup import Clock, chain_of
from tests.speculation.test_lookup import proposer_of, repetitive
from tests.support.batched import with_batch_table
from tests.support.engine import (
    assert_same_text,
    committed_rows,
    examples,
    plain,
    random_streams,
    small_model,
    stream_config,
)


def config_of(words: str, drafts: str = "streams,lookup") -> DecodeConfig:
    return DecodeConfig.of_words(
        *words.split()[:1], drafts=drafts, schedule=(words.split()[1:] or ["auto"])[0]
    )


class RowWhims(BatchGovernor):
    """Drafts or not, and verifies any number of looked-up rows, by a list."""

    def __init__(self, wants: Sequence[tuple[bool, int]]) -> None:
        super().__init__(clock=None)
        self.wants, self.at = wants, 0

    def speculates(self, requests: int) -> bool:
        self.at += 1
        return self.wants[self.at % len(self.wants)][0]

    def rows(self, drafted: int, found: Sequence[Continuations]) -> int:
        rows = self.wants[self.at % len(self.wants)][1]
        return rows if rows > 1 + drafted else 0


def assert_running_rows_are_fresh(decoder: BatchDecoder, requests: Sequence[Request]) -> None:
    """Fail unless the committed rows of all that run are those of a fresh prefill."""
    backbone = decoder.model.backbone
    for request in requests:
        if request.sequence.state != "running":
            continue
        row = request.sequence.row
        text = [*request.prompt, *request.tokens][:-1]
        assert decoder.cache.lengths[row] == len(text)
        fresh = KVCache(backbone.num_layers)
        if not text:
            continue
        backbone.forward(mx.array(text), fresh)
        fresh.advance(len(text))
        for layer, wanted in zip(decoder.cache.layers, committed_rows(fresh), strict=True):
            for mine, own in zip(layer.row(row, len(text)), wanted, strict=True):
                np.testing.assert_allclose(np.array(mine), own, atol=1e-4)


# ---- what is verified --------------------------------------------------------------------------


def found_chain(rng: random.Random, vocab: int, most: int) -> Continuations:
    """Return a chain of looked-up tokens with chances, perhaps none."""
    given_ = [rng.choice([0.05, 0.3, 0.7, 0.99]) for _ in range(rng.randrange(most + 1))]
    found = chain_of(*given_)
    found.tokens[:] = [rng.randrange(vocab) for _ in given_]
    return found


@examples(60)
@given(st.integers(0, 10**6))
def test_merged_chains_are_the_trees_of_each_request_alone(seed: int) -> None:
    """By the rule of `merge.py`, one text after another."""
    rng = random.Random(seed)
    vocab, levels, B = 7, rng.randrange(1, 4), rng.randrange(1, 5)
    proposers = [proposer_of(seed + b, levels, vocab, 4) for b in range(B)]
    found = [found_chain(rng, vocab, levels + 3) for _ in range(B)]
    roots, before = ([rng.randrange(vocab) for _ in range(B)] for _ in range(2))

    def together(level, parents, grandparents, places):  # type: ignore[no-untyped-def]
        each = [
            proposers[b](level, parents[b : b + 1], grandparents[b : b + 1], places[:1])
            for b in range(B)
        ]
        return tuple(mx.concatenate(parts) for parts in zip(*each, strict=True))

    chains = merged_chains(mx.array(roots), mx.array(before), levels, together, found)
    real = chains.real()
    T = chains.tokens.shape[1]
    for b in range(B):
        spec = TreeSpec("chain", branching=1, depth=levels)
        root, above = mx.array(roots[b]), mx.array(before[b])
        if len(found[b]):
            tree = merged_tree(root, spec, levels, proposers[b], above, found[b])
            length = tree.num_nodes
            alive = [True] * length if tree.alive is None else tree.alive.tolist()
            assert tree.looked_up is not None
            looked_up = tree.looked_up.tolist()
        else:
            from mlx_specstream.speculation.tree import build

            tree = build(root, spec, levels, proposers[b], above)
            length, alive, looked_up = (
                tree.num_nodes,
                [True] * tree.num_nodes,
                [False] * tree.num_nodes,
            )
        assert chains.lengths[b] == length
        mine = [True] * length if real is None else real[b, :length].tolist()
        assert mine == alive
        kept = [n for n in range(length) if alive[n]]
        assert [chains.tokens[b, n].item() for n in kept] == [tree.tokens[n].item() for n in kept]
        assert chains.looked_up is not None
        assert [chains.looked_up[b, n].item() for n in kept] == [looked_up[n] for n in kept]
        assert chains.tokens[b, length:].tolist() == [roots[b]] * (T - length)
        assert real is None or not any(real[b, length:].tolist())


def test_chains_side_by_side_are_filled_up_and_put_in_order() -> None:
    long, none = chain_of(0.9, 0.9), Continuations.none()
    long.tokens[:] = [5, 6]
    chains = looked_up_chains([1, 2], [long, none])
    assert chains.tokens.tolist() == [[1, 5, 6], [2, 2, 2]]
    assert (chains.lengths, chains.num_drafts) == ([3, 1], [2, 0])
    real = chains.real()
    assert real is not None
    assert real.tolist() == [[True, True, True], [True, False, False]]
    alone = looked_up_chains([3], [none])
    assert (alone.tokens.tolist(), alone.looked_up, alone.real()) == ([[3]], None, None)
    both = alone.beside(chains).take([2, 0, 1])
    assert both.tokens.tolist() == [[2, 2, 2], [3, 3, 3], [1, 5, 6]]
    assert both.lengths == [1, 1, 3]
    assert both.looked_up is not None
    assert both.looked_up.tolist()[1] == [False, False, False]


# ---- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["3", "8", "24", "chain4", "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_without_streams_look_up_alone_drafts(family: str, words: str) -> None:
    accepted = 0
    for seed in range(3):
        model = StreamModel.plain(small_model(family, vocab=12, seed=seed, attention=0.4))
        streams = random_streams(model.model, stream_config())
        decoder = BatchDecoder(model, config_of(words, "lookup"), prefill_budget=8)
        requests = [Request(decoder, repetitive(seed + 10 * n, 12), 30) for n in range(3)]
        requests.append(Request(decoder, prompt_of(3, seed), 30))
        while decoder.busy:
            step(decoder, requests)
            assert_running_rows_are_fresh(decoder, requests)
        for request in requests:
            assert_same_text(request.tokens, plain(streams, request.prompt, 30))
            for result in request.results:
                assert set(result.origins) <= {0, LOOK_UP}
                assert result.accepted <= result.drafted
            accepted += sum(result.accepted for result in request.results)
            cache = decoder.remove(request.sequence)
            assert_fresh(cache, streams, [*request.prompt, *request.tokens[:-1]])
    assert accepted > 40


WORDS = ("8", "8 inline", "chain3", "chain 2".replace(" ", ""), "24", "3", "3^2")


@examples(15)
@given(st.data())
def test_with_streams_the_texts_are_the_plain_ones(data: st.DataObject) -> None:
    """Any schedule, mode, governor and way of drawing, for requests that come and go."""
    draw = data.draw
    shared, seed = draw(st.booleans()), draw(st.integers(0, 5))
    model = streamed(
        small_model(draw(st.sampled_from(["llama", "qwen3"])), 3, 12, seed, attention=0.4),
        mode="shared" if shared else "lossless",
    )
    assert model.streams is not None
    config = config_of(draw(st.sampled_from(WORDS)))
    if shared:
        config = DecodeConfig(config.tree, drafts=config.drafts)
    wants = draw(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=6))
    governor = RowWhims(wants) if draw(st.booleans()) else None
    decoder = BatchDecoder(
        model, config, prefill_budget=draw(st.integers(2, 20)), governor=governor
    )
    if draw(st.booleans()):
        decoder = with_batch_table(decoder)
    samplers = [None, make_sampler(0.8)]
    requests: list[Request] = []

    def more(number: int) -> None:
        processors = make_logits_processors(repetition_penalty=1.3) if number == 2 else ()
        prompt = repetitive(seed + number, 12)
        requests.append(
            Request(decoder, prompt, 24, None, samplers[number % 2], processors, seed=number)
        )

    for number in range(3):
        more(number)
        for _ in range(draw(st.integers(0, 4))):
            step(decoder, requests)
            if not shared:
                assert_running_rows_are_fresh(decoder, requests)
    gone = draw(st.integers(0, 2))
    if requests[gone].sequence.state == "running":
        decoder.remove(requests[gone].sequence)
    more(3)
    finish(decoder, requests)
    for request in requests:
        assert request.error is None
        alone = plain(model.streams, request.prompt, 56, token_sampler=request.token_sampler())
        if request.sampler is None and not request.processors:
            assert_same_text(request.tokens, alone)
        else:
            assert request.tokens == alone.tokens[: len(request.tokens)]
        assert all(len(result.origins) == len(result.tokens) for result in request.results)
    if any(any(result.looked_up) for request in requests for result in request.results):
        event("drafts of look-up accepted")


def test_sliding_windows() -> None:
    for window in (1, 4):
        model = streamed(small_model("qwen3" if window == 1 else "llama", window=window))
        assert model.streams is not None
        decoder = BatchDecoder(model, config_of("12"))
        requests = [Request(decoder, repetitive(n, 12), 20) for n in (5, 1, 19)]
        finish(decoder, requests)
        for request in requests:
            assert_same_text(request.tokens, plain(model.streams, request.prompt, 20))
        assert any(any(result.looked_up) for r in requests for result in r.results)


def test_draws_beside_look_up_follow_the_models_distribution() -> None:
    """Eight equal requests at a time; a file says what follows the prompt, often rightly."""
    vocab, prompt = 5, [3, 1, 4]
    model = StreamModel.plain(small_model(vocab=vocab, seed=3))
    files = FileIndex([*prompt, 0, 2, *prompt, 1, 1, *prompt, 4, 3])
    decoder = BatchDecoder(model, config_of("6", "lookup"), files=files)
    assert_draws_follow(decoder, model, prompt, vocab)


@pytest.mark.parametrize("with_streams", [True, False])
def test_a_step_waits_for_the_device_once(
    monkeypatch: pytest.MonkeyPatch, with_streams: bool
) -> None:
    model = streamed(small_model()) if with_streams else StreamModel.plain(small_model())
    decoder = BatchDecoder(model, config_of("8", "streams,lookup"))
    requests = [Request(decoder, repetitive(n, 12), 24) for n in range(4)]
    decoder.step()
    waits: list[str] = []
    for name in ("tolist", "item", "__array__"):
        original = getattr(mx.array, name, None)
        if original is None:
            continue

        def counted(array, *, original=original, name=name):  # type: ignore[no-untyped-def]
            waits.append(name)
            return original(array)

        monkeypatch.setattr(mx.array, name, counted)
    steps = finish(decoder, requests)
    assert len(waits) == steps
    assert any(any(result.looked_up) for r in requests for result in r.results)


def test_what_was_said_stays_known_beside_the_cache() -> None:
    model = StreamModel.plain(small_model(vocab=64, attention=0.3))
    decoder = BatchDecoder(model, config_of("8", "lookup"))
    first = Request(decoder, list(range(20, 40)), 6)
    finish(decoder, [first])
    cache = decoder.remove(first.sequence)
    text = [*first.prompt, *first.tokens]
    second = Request(decoder, [text[-1], 20, 21, 22], 4, cache=cache)
    finish(decoder, [second])
    lookup = second.sequence.lookup
    assert lookup is not None
    assert lookup.text.tokens == [*text, 20, 21, 22, *second.tokens]
    assert second.results[0].drafted > 0  # 23 followed 22 in the first prompt
    told = decoder.add([22], cache=_of_length(model, 3), text=[20, 21, 22, 23, 20, 21, 22][3:])
    assert told.lookup is not None
    told.lookup.read()
    assert told.lookup.text.tokens == [23, 20, 21, 22]


def _of_length(model: StreamModel, length: int) -> KVCache:
    cache = KVCache(model.backbone.num_layers)
    model.backbone.forward(mx.array([23, 20, 21][:length]), cache)
    cache.advance(length)
    return cache


def test_where_look_up_drafts() -> None:
    plain_, joined = StreamModel.plain(small_model()), streamed(small_model())
    shared = streamed(small_model(), mode="shared")

    def looks_up(model: StreamModel, words: str, drafts: str | None, **options: bool) -> bool:
        config = DecodeConfig.of_words(words, drafts=drafts)
        return BatchDecoder(model, config, **options).lookup is not None  # type: ignore[arg-type]

    assert looks_up(plain_, "auto", None)
    assert looks_up(joined, "auto", None)
    assert not looks_up(joined, "auto", "streams")
    assert not looks_up(joined, "8", None)
    assert looks_up(joined, "8", "lookup")
    assert not looks_up(plain_, "auto", None, speculative=False)
    with pytest.raises(OptionError, match="shared mode"):
        looks_up(shared, "auto", "lookup")
    with pytest.raises(OptionError, match="name a number of rows"):
        looks_up(plain_, "3^2", "lookup")


# ---- what pays ---------------------------------------------------------------------------------


def test_rows_are_paid_by_all_that_share_the_pass() -> None:
    """One request's long match pays alone, and no more beside seven that quote nothing."""
    governor = BatchGovernor(clock=None, slope=0.1)
    long, nothing = chain_of(*[0.95] * 31), Continuations.none()
    alone = governor.rows(0, [long])
    assert alone >= 8
    assert 2 <= governor.rows(0, [long, nothing]) < alone
    assert governor.rows(0, [long, *[nothing] * 31]) == 0
    assert governor.rows(0, [long] * 8) > 2
    # Beside streams' drafts look-up must bring more than they do.
    assert governor.rows(3, [chain_of(0.9, 0.9)]) == 0
    assert governor.rows(3, [long]) > 4
    assert BatchGovernor(clock=None, slope=0.0).rows(0, [chain_of(MARGIN + 0.01)]) == 2


def test_costs_of_rows_follow_the_clock() -> None:
    clock = Clock()
    governor = BatchGovernor(clock=clock, slope=0.02)
    found = [chain_of(*[0.95] * 15)] * 2

    def passes(number: int, rows: int, seconds: float) -> None:
        for _ in range(number):
            clock.now += seconds
            governor.after(2, 2, speculated=False, undisturbed=True, widened=rows)

    passes(20, 0, 0.01)
    assert governor.rows(0, found) >= 12
    passes(200, 16, 0.2)
    passes(200, 6, 0.2)
    assert governor.rows(0, found) == 0
    assert governor.rows(0, found[:1]) >= 12  # of one request nothing has been timed


def test_promises_that_are_not_kept_are_believed_less_until_others_come() -> None:
    governor = BatchGovernor(clock=None, slope=0.1)
    found = [chain_of(0.9, 0.9, 0.9)] * 2
    assert governor.rows(0, found) > 0
    for _ in range(40):
        governor.accepted(2, 2.4, 0)
    assert governor.rows(0, found) == 0
    for _ in range(30):
        governor.begin()
    assert governor.rows(0, found) > 0


class Never(BatchGovernor):
    """Finds that nothing pays, and counts how often it was asked, until told otherwise."""

    asked = 0
    pays = False

    def rows(self, drafted: int, found: Sequence[Continuations]) -> int:
        self.asked += 1
        return 4 if self.pays else 0


def test_where_nothing_pays_one_pass_in_four_looks_up() -> None:
    model = StreamModel.plain(small_model(attention=0.4))
    governor = Never(clock=None)
    decoder = BatchDecoder(model, DecodeConfig(), governor=governor)
    requests = [Request(decoder, repetitive(n, 12), 200) for n in range(2)]
    for _ in range(PATIENCE + 1):
        decoder.step()
    assert governor.asked == PATIENCE
    for _ in range(20 * SELDOM):
        step(decoder, requests)
    assert governor.asked <= PATIENCE + 21
    assert all(result.drafted == 0 for request in requests for result in request.results)
    governor.pays, governor.asked = True, 0
    for _ in range(3 * SELDOM):
        step(decoder, requests)
    assert governor.asked > 2 * SELDOM
    assert any(any(result.looked_up) for request in requests for result in request.results)
    for request in requests:
        wanted = plain(random_streams(model.model, stream_config()), request.prompt, 200)
        assert_same_text(request.tokens, wanted)
