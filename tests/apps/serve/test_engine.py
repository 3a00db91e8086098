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
from mlx_specstream.apps.serve.settings import Settings
from mlx_specstream.apps.serve.work import Event, Failure, Piece, Progress, Work
from mlx_specstream.errors import ModelError, OptionError
from mlx_specstream.speculation.statistics import SpeculationStats


class Turns:
    """Decodes "token n of n": each step gives one answer in turn a token, when told to go."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.given: dict[Work, int] = {}
        self.ended: list[Work] = []
        self.go = threading.Semaphore(0)
        self.error: Exception | None = None

    def begin(self, work: Work) -> None:
        if work.prompt == [13]:
            raise OptionError("thirteen cannot be begun.")
        self.works.append(work)
        work.prompt_read = True

    def end(self, work: Work) -> None:
        self.works.remove(work)
        self.ended.append(work)

    def step(self) -> list[tuple[Work, Event]]:
        if not self.works:
            return []
        assert self.go.acquire(timeout=30)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        work = self.works.pop(0)
        self.works.append(work)
        count = self.given[work] = self.given.get(work, 0) + 1
        finish = "length" if count == work.settings.max_tokens else None
        stats = SpeculationStats(count, count)
        return [(work, Progress((Piece(count, "x", 0),), finish, stats, 0, 1.0))]


Make = Callable[..., tuple[Engine, Turns]]


@pytest.fixture
def make_engine() -> Iterator[Make]:
    made: list[tuple[Engine, Turns]] = []

    def make(concurrency: int = 2, max_queue: int = 2) -> tuple[Engine, Turns]:
        turns = Turns()
        engine = Engine(
            lambda: nullcontext(turns), decode_concurrency=concurrency, max_queue=max_queue
        )
        engine.start()
        made.append((engine, turns))
        return engine, turns

    yield make
    for engine, turns in made:
        turns.go.release(1000)
        engine.stop()


def work(tokens: int = 3, prompt: int = 1, limit_s: float = 60, **fields: Any) -> tuple[Work, Any]:
    events: queue.Queue[Event] = queue.Queue()
    deadline = time.monotonic() + limit_s
    return Work([prompt], Settings(tokens), events.put, deadline, **fields), events


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_answers_take_turns(make_engine: Make) -> None:
    engine, turns = make_engine()
    order: list[int] = []
    one, other = (work(prompt=prompt)[0] for prompt in (1, 2))
    for each in (one, other):
        each.deliver = lambda _, each=each: order.append(each.prompt[0])  # type: ignore[misc]
    engine.submit([one])
    engine.submit([other])
    until(lambda: engine.active == 2)
    turns.go.release(6)
    until(lambda: engine.idle)
    assert order == [1, 2, 1, 2, 1, 2]
    assert turns.ended == [one, other]


def test_a_full_line_is_refused_and_moves_on(make_engine: Make) -> None:
    engine, turns = make_engine(concurrency=1, max_queue=2)
    works = [work(tokens=1)[0] for _ in range(3)]
    for each in works:
        engine.submit([each])
    until(lambda: engine.active == 1)
    with pytest.raises(ApiError) as refused:
        engine.submit([work()[0]])
    assert refused.value.status == 429
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
    turns.go.release(1)
    until(lambda: len(turns.ended) == 1)
    engine.submit([work()[0]])
    with pytest.raises(ApiError, match="too many"):
        engine.submit([work()[0], work()[0]])
    with pytest.raises(ApiError) as never:
        engine.submit([work()[0] for _ in range(4)])
    assert never.value.status == 400


@pytest.mark.parametrize(("seconds_per_answer", "said"), [(0.01, 1), (6.0, 9), (1000.0, 60)])
def test_when_to_try_again_follows_the_line(
    make_engine: Make, seconds_per_answer: float, said: int
) -> None:
    """Two are waiting and two answers are written at a time: the next is one and a half away."""
    engine, _ = make_engine(concurrency=2, max_queue=2)
    engine.submit([work()[0] for _ in range(4)])
    until(lambda: engine.active == 2)
    engine.seconds_per_answer = seconds_per_answer
    with pytest.raises(ApiError, match=f"try again in {said} s") as refused:
        engine.submit([work()[0]])
    assert refused.value.headers["Retry-After"] == str(said)


def test_whoever_leaves_makes_room(make_engine: Make) -> None:
    engine, turns = make_engine(concurrency=1, max_queue=1)
    active, events = work()
    waiting, never = work()
    engine.submit([active])
    until(lambda: engine.active == 1)
    engine.submit([waiting])
    engine.cancel([waiting])
    third, _ = work()
    engine.submit([third])  # at once
    engine.cancel([active])
    turns.go.release(1)
    until(lambda: turns.ended == [active])
    until(lambda: turns.works == [third])
    assert events.empty()
    assert never.empty()


def test_an_answer_out_of_time_ends_with_what_there_is(make_engine: Make) -> None:
    engine, turns = make_engine(concurrency=1)
    active, events = work(tokens=100, limit_s=0.2)
    waiting, late = work(limit_s=0.2)
    engine.submit([active, waiting])
    turns.go.release(1)
    time.sleep(0.25)
    turns.go.release(1)
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
    engine, turns = make_engine()
    bad, refused = work(prompt=13)
    good, events = work(tokens=1)
    engine.submit([bad, good])
    turns.go.release(1)
    assert refused.get(timeout=30).error.status == 400
    assert events.get(timeout=30).finish_reason == "length"


def test_an_error_of_the_model_is_told_and_the_next_answer_works(make_engine: Make) -> None:
    engine, turns = make_engine()
    broken, events = work()
    turns.error = RuntimeError("private path")
    engine.submit([broken])
    turns.go.release(1)
    failed = events.get(timeout=30)
    assert failed.error.status == 500
    assert "private" not in failed.error.message
    good, events = work(tokens=1)
    engine.submit([good])
    turns.go.release(1)
    assert events.get(timeout=30).finish_reason == "length"


def test_siblings_wait_until_the_prompt_is_read(make_engine: Make) -> None:
    engine, turns = make_engine(concurrency=3)
    first, _ = work()
    second, _ = work(after=first)
    begin = turns.begin
    turns.begin = lambda one: (begin(one), setattr(one, "prompt_read", False))  # type: ignore
    engine.submit([first, second])
    until(lambda: turns.works == [first])
    turns.go.release(1)
    until(lambda: turns.given.get(first) == 1)
    assert turns.works == [first]
    first.prompt_read = True
    turns.go.release(1)
    until(lambda: second in turns.works)


def test_stopping_tells_everybody(make_engine: Make) -> None:
    engine, turns = make_engine(concurrency=1)
    works = [work() for _ in range(3)]
    for each, _ in works:
        engine.submit([each])
    until(lambda: engine.active == 1)
    engine.close()
    with pytest.raises(ApiError) as closed:
        engine.submit([work()[0]])
    assert closed.value.status == 503
    turns.go.release(1)
    engine.stop()
    for _, events in works:
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
        engine.submit([work()[0]])
    assert refused.value.status == 503
