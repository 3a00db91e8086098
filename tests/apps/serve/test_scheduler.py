"""Answers that come, go and share passes: each is what it would be alone."""

from __future__ import annotations

import time
from typing import Any

import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream import StreamModel, stream_generate
from mlx_specstream.apps.serve import scheduler as scheduler_module
from mlx_specstream.apps.serve.request import Failure, Request
from mlx_specstream.apps.serve.scheduler import Scheduler
from mlx_specstream.apps.serve.settings import Settings
from mlx_specstream.config import CacheConfig, DecodeConfig, SamplingConfig
from mlx_specstream.errors import ModelError
from tests.apps.serve.conftest import TREE
from tests.support.engine import examples
from tests.support.scripted import assert_holds, with_streams
from tests.support.tiny import byte_tokenizer, tiny_model

KINDS = (
    Settings(12),
    Settings(20, SamplingConfig(temp=1.0, top_p=0.95, seed=3)),
    Settings(9, SamplingConfig(repetition_penalty=1.3, logit_bias={100: 2.0})),
    Settings(15, stop=("zz", "\x03")),
)


LOOK_UP = DecodeConfig.of_words("8", drafts="streams,lookup")


def make_turns(model: StreamModel, **options: Any) -> Scheduler:
    options = {"prompt_cache_bytes": 2**28, "prefill_step_size": 4, "config": TREE, **options}
    return Scheduler(model, byte_tokenizer(), **options)


def make_work(prompt: list[int], settings: Settings) -> Request:
    return Request(prompt, settings, lambda _: None, time.monotonic() + 60)


def run(
    scheduler: Scheduler, requests: dict[int, list[Request]], cancel_at: dict[int, Request]
) -> dict[Request, str]:
    """Begin requests at the given steps; return what each wrote until it was over or cancelled."""
    texts: dict[Request, str] = {}
    last = max(requests)
    for step in range(2000):
        for request in requests.get(step, ()):
            scheduler.begin(request)
            texts[request] = ""
        gone = cancel_at.get(step)
        if gone is not None and gone in scheduler.requests:
            scheduler.end(gone)
        for request, event in scheduler.step():
            assert not isinstance(event, Failure), event
            texts[request] += "".join(piece.text for piece in event.pieces)
            request.over = event.finish_reason is not None
        for request in list(scheduler.requests):
            if request.over:
                scheduler.end(request)
        if step >= last and not scheduler.requests:
            return texts
    raise AssertionError("the answers do not end")


PROMPT = st.lists(st.integers(1, 120), min_size=1, max_size=14)
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 12), PROMPT, st.integers(0, len(KINDS) - 1), st.booleans()),
    min_size=1,
    max_size=5,
)


@examples(15)
@given(ARRIVALS, st.integers(1, 15), st.sampled_from([TREE, LOOK_UP, None]))
def test_company_changes_nothing(
    tiny_stream_model: StreamModel,
    arrivals: list[tuple[int, list[int], int, bool]],
    leave: int,
    config: DecodeConfig | None,
) -> None:
    model = tiny_stream_model
    scheduler = make_turns(model, config=config)
    requests: dict[int, list[Request]] = {}
    leaving: dict[int, Request] = {}
    for at, prompt, kind, leaves in arrivals:
        request = make_work(prompt, KINDS[kind])
        requests.setdefault(at, []).append(request)
        if leaves:
            leaving[at + leave] = request
    together = run(scheduler, requests, leaving)
    for request, text in together.items():
        alone = run(make_turns(model), {0: [make_work(request.prompt, request.settings)]}, {})
        (whole,) = alone.values()
        assert text == whole if request.over else whole.startswith(text)
    for entry in scheduler.prefixes.entries:
        assert_holds(entry.kv, model, entry.tokens)


def test_answers_share_passes(
    tiny_stream_model: StreamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make_turns(tiny_stream_model)
    assert scheduler.batch is not None
    sizes: list[int] = []
    step = scheduler.batch.step

    def counted() -> Any:
        found = step()
        sizes.append(len(found))
        return found

    monkeypatch.setattr(scheduler.batch, "step", counted)
    run(scheduler, {0: [make_work([n, 1], Settings(10)) for n in (1, 2, 3)]}, {})
    assert sizes.count(3) >= 5


def test_answers_that_share_passes_are_looked_up_in_their_whole_texts(
    tiny_stream_model: StreamModel,
) -> None:
    """A batch is given the last token alone: what precedes it is known all the same."""
    model = StreamModel.plain(tiny_stream_model.model)
    scheduler = make_turns(model, config=DecodeConfig.of_words("8", drafts="lookup"))
    prompts = [[*range(40, 60), n, *range(40, 44)] for n in (1, 2, 3)]
    works = [make_work(prompt, Settings(12)) for prompt in prompts]
    for work in works:
        scheduler.begin(work)
    known: dict[int, list[int]] = {}
    drafted = 0
    while scheduler.requests:
        for request, event in scheduler.step():
            assert not isinstance(event, Failure)
            drafted = max(drafted, event.stats.drafted)
            request.over = event.finish_reason is not None
        for sequence, answer in scheduler.sequences.items():
            assert sequence.lookup is not None
            known[works.index(answer.request)] = list(sequence.lookup.text.tokens)
        for request in list(scheduler.requests):
            if request.over:
                scheduler.end(request)
    assert len(known) >= 2
    assert drafted > 0
    for number, text in known.items():
        assert text[: len(prompts[number])] == prompts[number]


def test_a_model_that_cannot_be_batched_takes_turns(
    tiny_llama: nn.Module, tiny_stream_model: StreamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ModelError("this one is odd.")

    requests = [make_work([n, 7, 9], KINDS[n]) for n in range(1, 4)]
    batched = run(make_turns(tiny_stream_model), {0: requests}, {})
    monkeypatch.setattr(scheduler_module, "BatchDecoder", refuse)
    scheduler = make_turns(tiny_stream_model)
    assert scheduler.batch is None
    again = [make_work(request.prompt, request.settings) for request in requests]
    in_turn = run(scheduler, {0: again}, {})
    assert list(in_turn.values()) == list(batched.values())


def test_an_answers_own_error_is_its_own(tiny_stream_model: StreamModel) -> None:
    scheduler = make_turns(tiny_stream_model)
    good, bad = make_work([1, 2], Settings(8)), make_work([3, 4], Settings(8))
    scheduler.begin(good)
    scheduler.begin(bad)

    def fail(tokens: Any, logits: Any) -> Any:
        if tokens.shape[0] > 3:
            raise ValueError("no")
        return logits

    next(one for one in scheduler.reading if one.request is bad).token_sampler.processors = (fail,)
    given, failed = "", []
    for _ in range(40):
        for request, event in scheduler.step():
            if isinstance(event, Failure):
                failed.append(request)
                request.over = True
            elif request is good:
                given += "".join(piece.text for piece in event.pieces)
                request.over = event.finish_reason is not None
        for request in list(scheduler.requests):
            if request.over:
                scheduler.end(request)
    assert failed == [bad]
    alone = run(make_turns(tiny_stream_model), {0: [make_work([1, 2], Settings(8))]}, {})
    assert [given] == list(alone.values())
    assert all(entry.tokens[:2] != [3, 4] for entry in scheduler.prefixes.entries)


def test_when_a_shared_pass_fails_the_next_answers_start_afresh(
    tiny_stream_model: StreamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make_turns(tiny_stream_model)
    broken = scheduler.batch
    lost = [make_work([n, 1], Settings(8)) for n in (1, 2)]
    for request in lost:
        scheduler.begin(request)
    for _ in range(5):
        scheduler.step()

    def fail() -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(broken, "step", fail)
    failures = scheduler.step()
    assert [request for request, event in failures if isinstance(event, Failure)] == lost
    for request in lost:
        scheduler.end(request)
    assert not scheduler.prefixes.entries
    again = run(
        scheduler, {0: [make_work(request.prompt, request.settings) for request in lost]}, {}
    )
    fresh = run(
        make_turns(tiny_stream_model),
        {0: [make_work(request.prompt, request.settings) for request in lost]},
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
    scheduler = make_turns(model, caching=caching, prompt_cache_bytes=0)
    assert scheduler.batch is None
    requests = [make_work(prompt, Settings(20)) for prompt in prompts * 2]
    found = run(scheduler, {0: requests[:2], 3: requests[2:4], 9: requests[4:]}, {})
    assert [found[request] for request in requests] == expected * 2
    assert not scheduler.prefixes.entries
