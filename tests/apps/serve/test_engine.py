"""The line of answers and the thread behind it, with a decoder that does as it is told."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from mlx_specstream.apps.serve.engine import Engine
from mlx_specstream.apps.serve.errors import ApiError
from mlx_specstream.apps.serve.request import Event, Failure, Piece, Progress, Request
from mlx_specstream.apps.serve.settings import Settings
from mlx_specstream.errors import ModelError, OptionError
from mlx_specstream.speculation.statistics import SpeculationStats


class Scheduler:
    """Decodes "token n of n": each step gives one answer in turn a token, when told to go."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.given: dict[Request, int] = {}
        self.ended: list[Request] = []
        self.go = threading.Semaphore(0)
        self.error: Exception | None = None

    def begin(self, request: Request) -> None:
        if request.prompt == [13]:
            raise OptionError("thirteen cannot be begun.")
        self.requests.append(request)
        request.prompt_read = True

    def end(self, request: Request) -> None:
        self.requests.remove(request)
        self.ended.append(request)

    def step(self) -> list[tuple[Request, Event]]:
        if not self.requests:
            return []
        assert self.go.acquire(timeout=30)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        request = self.requests.pop(0)
        self.requests.append(request)
        count = self.given[request] = self.given.get(request, 0) + 1
        finish = "length" if count == request.settings.max_tokens else None
        stats = SpeculationStats(count, count)
        return [(request, Progress((Piece(count, "x", 0),), finish, stats, 0, 1.0))]


Make = Callable[..., tuple[Engine, Scheduler]]


@pytest.fixture
def make_engine() -> Iterator[Make]:
    made: list[tuple[Engine, Scheduler]] = []

    def make(concurrency: int = 2, max_queue: int = 2) -> tuple[Engine, Scheduler]:
        scheduler = Scheduler()
        engine = Engine(
            lambda: nullcontext(scheduler), decode_concurrency=concurrency, max_queue=max_queue
        )
        engine.start()
        made.append((engine, scheduler))
        return engine, scheduler

    yield make
    for engine, scheduler in made:
        scheduler.go.release(1000)
        engine.stop()


def request(
    tokens: int = 3, prompt: int = 1, limit_s: float = 60, **fields: Any
) -> tuple[Request, Any]:
    events: queue.Queue[Event] = queue.Queue()
    deadline = time.monotonic() + limit_s
    return Request([prompt], Settings(tokens), events.put, deadline, **fields), events


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_answers_take_turns(make_engine: Make) -> None:
    engine, scheduler = make_engine()
    order: list[int] = []
    one, other = (request(prompt=prompt)[0] for prompt in (1, 2))
    for each in (one, other):
        each.deliver = lambda _, each=each: order.append(each.prompt[0])  # type: ignore[misc]
    engine.submit([one])
    engine.submit([other])
    until(lambda: engine.active == 2)
    scheduler.go.release(6)
    until(lambda: engine.idle)
    assert order == [1, 2, 1, 2, 1, 2]
    assert scheduler.ended == [one, other]


def test_a_full_line_is_refused_and_moves_on(make_engine: Make) -> None:
    engine, scheduler = make_engine(concurrency=1, max_queue=2)
    requests = [request(tokens=1)[0] for _ in range(3)]
    for each in requests:
        engine.submit([each])
    until(lambda: engine.active == 1)
    with pytest.raises(ApiError) as refused:
        engine.submit([request()[0]])
    assert refused.value.status == 429
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
    scheduler.go.release(1)
    until(lambda: len(scheduler.ended) == 1)
    engine.submit([request()[0]])
    with pytest.raises(ApiError, match="too many"):
        engine.submit([request()[0], request()[0]])
    with pytest.raises(ApiError) as never:
        engine.submit([request()[0] for _ in range(4)])
    assert never.value.status == 400


@pytest.mark.parametrize(("seconds_per_answer", "said"), [(0.01, 1), (6.0, 9), (1000.0, 60)])
def test_when_to_try_again_follows_the_line(
    make_engine: Make, seconds_per_answer: float, said: int
) -> None:
    """Two are waiting and two answers are written at a time: the next is one and a half away."""
    engine, _ = make_engine(concurrency=2, max_queue=2)
    engine.submit([request()[0] for _ in range(4)])
    until(lambda: engine.active == 2)
    engine.seconds_per_answer = seconds_per_answer
    with pytest.raises(ApiError, match=f"try again in {said} s") as refused:
        engine.submit([request()[0]])
    assert refused.value.headers["Retry-After"] == str(said)


def test_whoever_leaves_makes_room(make_engine: Make) -> None:
    engine, scheduler = make_engine(concurrency=1, max_queue=1)
    active, events = request()
    waiting, never = request()
    engine.submit([active])
    until(lambda: engine.active == 1)
    engine.submit([waiting])
    engine.cancel([waiting])
    third, _ = request()
    engine.submit([third])  # at once
    engine.cancel([active])
    scheduler.go.release(1)
    until(lambda: scheduler.ended == [active])
    until(lambda: scheduler.requests == [third])
    assert events.empty()
    assert never.empty()


def test_an_answer_out_of_time_ends_with_what_there_is(make_engine: Make) -> None:
    engine, scheduler = make_engine(concurrency=1)
    active, events = request(tokens=100, limit_s=0.2)
    waiting, late = request(limit_s=0.2)
    engine.submit([active, waiting])
    scheduler.go.release(1)
    time.sleep(0.25)
    scheduler.go.release(1)
    event = late.get(timeout=30)
    assert isinstance(event, Failure)
    assert event.error.status == 503
    pieces = []
    while True:
        event = events.get(timeout=30)
        assert isinstance(event, Progress)
        pieces += event.pieces
        if event.finish_reason:
            break
    assert event.finish_reason == "length"
    assert 1 <= len(pieces) <= 2


def test_an_answer_that_cannot_begin_hurts_no_other(make_engine: Make) -> None:
    engine, scheduler = make_engine()
    bad, refused = request(prompt=13)
    good, events = request(tokens=1)
    engine.submit([bad, good])
    scheduler.go.release(1)
    assert refused.get(timeout=30).error.status == 400
    assert events.get(timeout=30).finish_reason == "length"


def test_an_error_of_the_model_is_told_and_the_next_answer_works(make_engine: Make) -> None:
    engine, scheduler = make_engine()
    broken, events = request()
    scheduler.error = RuntimeError("private path")
    engine.submit([broken])
    scheduler.go.release(1)
    failed = events.get(timeout=30)
    assert failed.error.status == 500
    assert "private" not in failed.error.message
    good, events = request(tokens=1)
    engine.submit([good])
    scheduler.go.release(1)
    assert events.get(timeout=30).finish_reason == "length"


def test_siblings_wait_until_the_prompt_is_read(make_engine: Make) -> None:
    engine, scheduler = make_engine(concurrency=3)
    first, _ = request()
    second, _ = request(after=first)
    begin = scheduler.begin
    scheduler.begin = lambda one: (begin(one), setattr(one, "prompt_read", False))  # type: ignore
    engine.submit([first, second])
    until(lambda: scheduler.requests == [first])
    scheduler.go.release(1)
    until(lambda: scheduler.given.get(first) == 1)
    assert scheduler.requests == [first]
    first.prompt_read = True
    scheduler.go.release(1)
    until(lambda: second in scheduler.requests)


def test_stopping_tells_everybody(make_engine: Make) -> None:
    engine, scheduler = make_engine(concurrency=1)
    requests = [request() for _ in range(3)]
    for each, _ in requests:
        engine.submit([each])
    until(lambda: engine.active == 1)
    engine.close()
    with pytest.raises(ApiError) as closed:
        engine.submit([request()[0]])
    assert closed.value.status == 503
    scheduler.go.release(1)
    engine.stop()
    for _, events in requests:
        *_, last = list(events.queue)
        assert isinstance(last, Failure)
        assert last.error.status == 503
    assert not engine.healthy


def test_a_model_that_cannot_be_loaded_is_the_callers_error() -> None:
    def broken() -> Any:
        raise ModelError("the model is gone.")

    engine = Engine(broken, decode_concurrency=1, max_queue=0)
    with pytest.raises(ModelError, match="is gone"):
        engine.start()
    with pytest.raises(ApiError) as refused:
        engine.submit([request()[0]])
    assert refused.value.status == 503
