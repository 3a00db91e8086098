"""One request's answers between engine and client: whole, or as server-sent events.

However it ends (done, an error, the client is gone, time is over), the engine is told to let go of
what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .disconnect import until_gone
from .replies import Choice, Delta, Reply
from .request import Event, Failure, Progress, Request
from .service import Service
from .settings import Settings

KEEP_ALIVE_S = 10.0  # between signs of life while an answer waits or its prompt is read
GRACE_S = 5.0  # beyond the time limit, for the last events to be sent
CLIENT_GONE = 499  # nginx's status for it; only the metrics see it


class Answering:
    """The answers to one request: submitted when made, cancelled by `close`."""

    def __init__(
        self,
        service: Service,
        reply: Reply,
        prompts: Sequence[list[int]],
        settings: Sequence[Settings],
        arrived: float,
    ) -> None:
        self.service = service
        self.reply = reply
        self.arrived = arrived
        self.first_token = True
        self.left = len(reply.choices)
        self.events: asyncio.Queue[tuple[Choice, Event]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        deadline = arrived + service.limits.time_limit_s
        self.requests: list[Request] = []
        n = len(reply.choices) // len(prompts)
        for place, choice in enumerate(reply.choices):
            number = place % n  # of the answers to one prompt
            self.requests.append(
                Request(
                    prompt=prompts[place // n],
                    settings=settings[place],
                    deliver=partial(self._deliver, choice),
                    deadline=deadline,
                    after=self.requests[-1] if number else None,
                    shared=number < n - 1,
                )
            )
        service.engine.submit(self.requests)

    def _deliver(self, choice: Choice, event: Event) -> None:
        """Take an event, in the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, (choice, event))
        except RuntimeError:  # the loop is closed: the server has ended
            return

    async def next(self) -> tuple[Choice, Event]:
        """Return the next event."""
        choice, event = await self.events.get()
        if isinstance(event, Failure):
            self.left = 0
        else:
            if self.first_token and event.pieces:
                self.first_token = False
                self.service.metrics.first_token.observe(time.monotonic() - self.arrived)
            self.left -= event.finish_reason is not None
        return choice, event

    async def take(self, choice: Choice, event: Progress) -> Delta:
        """Return what an event adds to a choice."""
        if choice.reader is not None and choice.reader.is_slow:
            return await self.loop.run_in_executor(None, choice.take, event)
        return choice.take(event)

    def close(self) -> None:
        """Let go of what is not finished, and count what was."""
        self.service.engine.cancel(self.requests)
        metrics, usage = self.service.metrics, self.reply.usage()
        metrics.duration.observe(time.monotonic() - self.arrived)
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.cached_tokens.inc(usage["prompt_tokens_details"]["cached_tokens"])
        for stats in (choice.stats for choice in self.reply.choices):
            metrics.tokens.inc(stats.tokens)
            metrics.passes.inc(stats.passes)
            metrics.drafted.inc(stats.drafted)
            metrics.accepted.inc(stats.accepted)


class WholeAnswer:
    """An ASGI response: one JSON object when all answers are over."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await until_gone(receive, self._response(scope["path"]))
        finally:
            self.answering.close()
        if response is None:
            scope["specstream.gone"] = True
            return
        await response(scope, receive, send)

    async def _response(self, path: str) -> Response:
        answering = self.answering
        while answering.left:
            choice, event = await answering.next()
            if isinstance(event, Failure):
                return event.error.response(path)
            answering.reply.chunks(choice, await answering.take(choice, event))
        return JSONResponse(answering.reply.whole())


class StreamedAnswer:
    """An ASGI response: server-sent events, one per pass and choice."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self.answering.service.limits.time_limit_s + GRACE_S
        sending = asyncio.wait_for(self._send(scope, receive, send), limit)
        try:
            if await until_gone(receive, sending) is None:
                scope["specstream.gone"] = True
        except asyncio.TimeoutError:  # a client that stopped reading
            scope["specstream.gone"] = True
        finally:
            self.answering.close()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Send the stream; what fails before it begins, within a while, gets a status instead."""
        first: tuple[Choice, Event] | None = None
        patience = min(KEEP_ALIVE_S, self.answering.service.limits.time_limit_s)
        with contextlib.suppress(asyncio.TimeoutError):
            first = await asyncio.wait_for(self.answering.next(), patience)
        if first is not None and isinstance(first[1], Failure):
            await first[1].error.response(scope["path"])(scope, receive, send)
            return True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for part in self._parts(first):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    async def _parts(self, first: tuple[Choice, Event] | None) -> AsyncIterator[bytes]:
        answering, reply = self.answering, self.answering.reply
        for chunk in reply.first_chunks():
            yield _event(chunk)
        while answering.left or first is not None:
            try:
                if first is None:
                    first = await asyncio.wait_for(answering.next(), KEEP_ALIVE_S)
            except asyncio.TimeoutError:
                yield b": still here\n\n"
                continue
            (choice, event), first = first, None
            if isinstance(event, Failure):
                for chunk in reply.failure(event.error):
                    yield _event(chunk)
                return
            for chunk in reply.chunks(choice, await answering.take(choice, event)):
                yield _event(chunk)
        for chunk in reply.last_chunks():
            yield _event(chunk)
        if reply.end:
            yield reply.end


def _event(value: dict[str, Any]) -> bytes:
    """Return a server-sent event, with a name if its data has a type."""
    name = f"event: {value['type']}\n" if "type" in value else ""
    data = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return f"{name}data: {data}\n\n".encode()
