"""One thread that owns the model, and the bounded line of answers that wait for it.

    submit ──► waiting (at most max_queue) ──► decoding (at most decode_concurrency) ──► deliver

MLX arrays belong to the thread that computes them, so the model is loaded, used and let go in
this thread alone. Everything else talks to it through `submit` and `cancel`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import mlx.core as mx

from ...exit_status import end_if_lost
from .errors import ApiError, invalid
from .request import Decoding, Event, Failure, Progress, Request

log = logging.getLogger("mlx_specstream")

CLEAR_EVERY = 256  # steps, after which unused buffers are given back, as mlx-lm does


class Engine:
    """Generates the submitted answers, first come, first served.

    make: entered once, in the engine's thread, and left when it ends; gives what decodes.
    """

    def __init__(
        self,
        make: Callable[[], AbstractContextManager[Decoding]],
        *,
        decode_concurrency: int,
        max_queue: int,
    ) -> None:
        self.make = make
        self.decode_concurrency = decode_concurrency
        self.max_queue = max_queue
        self.waiting: deque[Request] = deque()
        self.active = 0
        self.seconds_per_answer = 1.0  # a running mean, for Retry-After
        self._changed = threading.Condition()
        self._closing: ApiError | None = None
        self._stop = False
        self._steps = 0
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="specstream-engine", daemon=True)

    # Called from other threads.

    def start(self) -> None:
        """Load the model and begin.

        Raises:
            SpecStreamError: the model cannot be loaded.
        """
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    @property
    def healthy(self) -> bool:
        """Tell whether answers are being generated."""
        return self._thread.is_alive() and self._closing is None

    def submit(self, requests: Sequence[Request]) -> None:
        """Line up the answers to one request, all or none.

        Raises:
            ApiError: there is no room (429), or the server is closing (503).
        """
        with self._changed:
            if self._closing is not None:
                raise self._closing
            if not self._thread.is_alive():
                raise ApiError(503, "the model is not running; restart the server.")
            room = self.decode_concurrency + self.max_queue
            if self.active + len(self.waiting) + len(requests) > room:
                raise self._full(len(requests))
            self.waiting.extend(requests)
            self._changed.notify()

    def cancel(self, requests: Sequence[Request]) -> None:
        """Let go of answers nobody waits for; those that wait in line leave it at once."""
        with self._changed:
            for request in requests:
                request.cancelled = True
                if request in self.waiting:
                    self.waiting.remove(request)
            self._changed.notify()

    def close(self) -> None:
        """Take no more answers; those taken on are finished."""
        with self._changed:
            self._closing = ApiError(503, "the server is shutting down.")

    def stop(self) -> None:
        """End all answers with an error and the thread; return when it has ended."""
        self.close()
        with self._changed:
            self._stop = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def idle(self) -> bool:
        """Tell whether no answer is under way or waiting."""
        with self._changed:
            return not self.active and not self.waiting

    def _full(self, wanted: int) -> ApiError:
        turns = (len(self.waiting) + 1) / self.decode_concurrency
        seconds = min(60, max(1, round(turns * self.seconds_per_answer)))
        if wanted > self.max_queue + self.decode_concurrency:
            return invalid(
                f"this request asks for {wanted} answers at once, more than this server has "
                f"room for ({self.max_queue + self.decode_concurrency})."
            )
        return ApiError(
            429,
            f"too many requests: {self.active} answers are being generated and "
            f"{len(self.waiting)} are waiting; try again in {seconds} s.",
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )

    # The engine's thread.

    def _run(self) -> None:
        try:
            with self.make() as decoding:
                self._started.set()
                self._loop(decoding)
        except BaseException as error:
            if self._started.is_set():
                log.exception("the model stopped")
            self._error = error
        finally:
            self._started.set()

    def _loop(self, decoding: Decoding) -> None:
        try:
            while self._turn(decoding):
                pass
        finally:
            reason = self._closing or ApiError(500, "the model stopped unexpectedly.")
            with self._changed:
                left = [*decoding.requests, *self.waiting]
                self.waiting.clear()
                self.active = 0
            for request in left:
                self._deliver(request, Failure(reason))

    def _turn(self, decoding: Decoding) -> bool:
        """Admit, decode one step, tidy up; return False when it is time to stop."""
        with self._changed:
            if not self._stop and not self.active and not self.waiting:
                mx.clear_cache()
                self._changed.wait()
            if self._stop:
                return False
        self._admit(decoding)
        try:
            events = decoding.step()
        except Exception as error:
            end_if_lost(error)
            # Which answer it was is not known, and no state can be trusted.
            for request in list(decoding.requests):
                self._fail(decoding, request, error)
            events = []
        for request, event in events:
            self._deliver(request, event)
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        now = time.monotonic()
        for request in list(decoding.requests):
            if not request.over and not request.cancelled and now > request.deadline:
                self._deliver(request, out_of_time(request))
            if request.over or request.cancelled:
                self._end(decoding, request)
        return True

    def _next(self) -> Request | None:
        """Return the first in line, unless the answer it comes after still reads the prompt."""
        if not self.waiting:
            return None
        request = self.waiting[0]
        before = request.after
        ready = before is None or before.prompt_read or before.over or before.cancelled
        return request if ready else None

    def _admit(self, decoding: Decoding) -> None:
        """Take on as many answers as may be decoded at once; those out of time leave the line."""
        now = time.monotonic()
        with self._changed:
            late = [request for request in self.waiting if now > request.deadline]
            for request in late:
                self.waiting.remove(request)
        for request in late:
            self._deliver(request, out_of_time(request))
        while True:
            with self._changed:
                first = self._next() if self.active < self.decode_concurrency else None
                if first is None:
                    return
                self.waiting.popleft()
                self.active += 1
            first.begun_at = time.monotonic()
            try:
                decoding.begin(first)
            except Exception as error:
                end_if_lost(error)
                with self._changed:
                    self.active -= 1
                self._deliver(first, Failure.of(error))

    def _fail(self, decoding: Decoding, request: Request, error: Exception) -> None:
        self._deliver(request, Failure.of(error))
        self._end(decoding, request)

    def _end(self, decoding: Decoding, request: Request) -> None:
        request.over = True
        try:
            decoding.end(request)
        except Exception:
            log.exception("an answer could not be ended cleanly")
        with self._changed:
            self.active -= 1
        spent = time.monotonic() - request.begun_at
        self.seconds_per_answer += 0.2 * (spent - self.seconds_per_answer)

    def _deliver(self, request: Request, event: Event) -> None:
        """Hand over an event; an answer is over after a finish reason or an error."""
        if request.over or request.cancelled:
            return
        if isinstance(event, Progress):
            request.last = event
        request.over = isinstance(event, Failure) or event.finish_reason is not None
        request.deliver(event)


def out_of_time(request: Request) -> Event:
    """Return the end of an answer whose time is over: what there is of it, or an error."""
    if request.last is None:
        return Failure(
            ApiError(503, "the server was too busy to begin this answer in time; try again later.")
        )
    last = request.last
    return Progress((), "length", last.stats, last.cached_tokens, last.tokens_per_s)
