"""Answers that come, go and share passes: each is what it would be alone."""

from __future__ import annotations

import time
from typing import Any

import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream import StreamModel, stream_generate
from mlx_specstream.apps.serve import turns as turns_module
from mlx_specstream.apps.serve.settings import Settings
from mlx_specstream.apps.serve.turns import Turns
from mlx_specstream.apps.serve.work import Failure, Work
from mlx_specstream.config import CacheConfig
from mlx_specstream.errors import ModelError
from tests.apps.serve.conftest import TREE
from tests.support.engine import examples
from tests.support.scripted import assert_holds, with_streams
from tests.support.tiny import byte_tokenizer, tiny_model

KINDS = (
    Settings(12),
    Settings(20, temperature=1.0, top_p=0.95, seed=3),
    Settings(9, repetition_penalty=1.3, logit_bias={100: 2.0}),
    Settings(15, stop=("zz", "\x03")),
)


def make_turns(model: StreamModel, **options: Any) -> Turns:
    options = {"prompt_cache_bytes": 2**28, "prefill_step_size": 4, **options}
    return Turns(model, byte_tokenizer(), config=TREE, **options)


def make_work(prompt: list[int], settings: Settings) -> Work:
    return Work(prompt, settings, lambda _: None, time.monotonic() + 60)


def run(turns: Turns, works: dict[int, list[Work]], cancel_at: dict[int, Work]) -> dict[Work, str]:
    """Begin works at the given steps; return what each wrote until it was over or cancelled."""
    texts: dict[Work, str] = {}
    last = max(works)
    for step in range(2000):
        for work in works.get(step, ()):
            turns.begin(work)
            texts[work] = ""
        gone = cancel_at.get(step)
        if gone is not None and gone in turns.works:
            turns.end(gone)
        for work, event in turns.step():
            assert not isinstance(event, Failure), event
            texts[work] += "".join(piece.text for piece in event.pieces)
            work.over = event.finish_reason is not None
        for work in list(turns.works):
            if work.over:
                turns.end(work)
        if step >= last and not turns.works:
            return texts
    raise AssertionError("the answers do not end")


PROMPT = st.lists(st.integers(1, 120), min_size=1, max_size=14)
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 12), PROMPT, st.integers(0, len(KINDS) - 1), st.booleans()),
    min_size=1,
    max_size=5,
)


@examples(15)
@given(ARRIVALS, st.integers(1, 15))
def test_company_changes_nothing(
    tiny_stream_model: StreamModel, arrivals: list[tuple[int, list[int], int, bool]], leave: int
) -> None:
    model = tiny_stream_model
    turns = make_turns(model)
    works: dict[int, list[Work]] = {}
    leaving: dict[int, Work] = {}
    for at, prompt, kind, leaves in arrivals:
        work = make_work(prompt, KINDS[kind])
        works.setdefault(at, []).append(work)
        if leaves:
            leaving[at + leave] = work
    together = run(turns, works, leaving)
    for work, text in together.items():
        alone = run(make_turns(model), {0: [make_work(work.prompt, work.settings)]}, {})
        (whole,) = alone.values()
        assert text == whole if work.over else whole.startswith(text)
    for entry in turns.prefixes.entries:
        assert_holds(entry.kv, model, entry.tokens)


def test_answers_share_passes(
    tiny_stream_model: StreamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = make_turns(tiny_stream_model)
    assert turns.batch is not None
    sizes: list[int] = []
    step = turns.batch.step

    def counted() -> Any:
        found = step()
        sizes.append(len(found))
        return found

    monkeypatch.setattr(turns.batch, "step", counted)
    run(turns, {0: [make_work([n, 1], Settings(10)) for n in (1, 2, 3)]}, {})
    assert sizes.count(3) >= 5


def test_a_model_that_cannot_be_batched_takes_turns(
    tiny_llama: nn.Module, tiny_stream_model: StreamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ModelError("this one is odd.")

    works = [make_work([n, 7, 9], KINDS[n]) for n in range(1, 4)]
    batched = run(make_turns(tiny_stream_model), {0: works}, {})
    monkeypatch.setattr(turns_module, "BatchDecoder", refuse)
    turns = make_turns(tiny_stream_model)
    assert turns.batch is None
    again = [make_work(work.prompt, work.settings) for work in works]
    in_turn = run(turns, {0: again}, {})
    assert list(in_turn.values()) == list(batched.values())


def test_an_answers_own_error_is_its_own(tiny_stream_model: StreamModel) -> None:
    turns = make_turns(tiny_stream_model)
    good, bad = make_work([1, 2], Settings(8)), make_work([3, 4], Settings(8))
    turns.begin(good)
    turns.begin(bad)

    def fail(tokens: Any, logits: Any) -> Any:
        if tokens.shape[0] > 3:
            raise ValueError("no")
        return logits

    next(one for one in turns.reading if one.work is bad).token_sampler.processors = (fail,)
    given, failed = "", []
    for _ in range(40):
        for work, event in turns.step():
            if isinstance(event, Failure):
                failed.append(work)
                work.over = True
            elif work is good:
                given += "".join(piece.text for piece in event.pieces)
                work.over = event.finish_reason is not None
        for work in list(turns.works):
            if work.over:
                turns.end(work)
    assert failed == [bad]
    alone = run(make_turns(tiny_stream_model), {0: [make_work([1, 2], Settings(8))]}, {})
    assert [given] == list(alone.values())
    assert all(entry.tokens[:2] != [3, 4] for entry in turns.prefixes.entries)


def test_when_a_shared_pass_fails_the_next_answers_start_afresh(
    tiny_stream_model: StreamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = make_turns(tiny_stream_model)
    broken = turns.batch
    lost = [make_work([n, 1], Settings(8)) for n in (1, 2)]
    for work in lost:
        turns.begin(work)
    for _ in range(5):
        turns.step()

    def fail() -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(broken, "step", fail)
    failures = turns.step()
    assert [work for work, event in failures if isinstance(event, Failure)] == lost
    for work in lost:
        turns.end(work)
    assert not turns.prefixes.entries
    again = run(turns, {0: [make_work(work.prompt, work.settings) for work in lost]}, {})
    fresh = run(
        make_turns(tiny_stream_model),
        {0: [make_work(work.prompt, work.settings) for work in lost]},
        {},
    )
    assert list(again.values()) == list(fresh.values())


@pytest.mark.parametrize(
    "caching",
    [CacheConfig(max_kv_size=12), CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=6)],
)
def test_caches_that_do_not_keep_all_rows_are_each_answers_own(caching: CacheConfig) -> None:
    """What one prompt gives does not depend on the others, nor on how often it was asked."""
    model = with_streams(tiny_model("llama", head_dim=32))
    prompts = [list(b"one question"), list(b"one questioN"), list(b"two")]
    expected = [
        "".join(
            response.text
            for response in stream_generate(
                model,
                byte_tokenizer(),
                prompt,
                max_tokens=20,
                config=TREE,
                prompt_cache=model.backbone.new_cache(caching),
                prefill_step_size=4,
            )
        )
        for prompt in prompts
    ]
    turns = make_turns(model, caching=caching, prompt_cache_bytes=0)
    assert turns.batch is None
    works = [make_work(prompt, Settings(20)) for prompt in prompts * 2]
    found = run(turns, {0: works[:2], 3: works[2:4], 9: works[4:]}, {})
    assert [found[work] for work in works] == expected * 2
    assert not turns.prefixes.entries
