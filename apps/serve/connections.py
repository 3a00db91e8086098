"""Connections: how many there may be, how long a client may be silent, and refusals below HTTP.

    connected ──► headers complete ──► answered ──► silent, until the next request
        header time limit     body, answer      idle time limit

Beyond `max_connections` the one that has been silent longest makes room, so that sockets that ask
for nothing keep nobody out. A client that does not read what it is sent is let go of, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import OptionError
from .errors import ApiError
from .limits import Limits

log = logging.getLogger("mlx_specstream")

BACKLOG = 128  # connections that may wait to be accepted
SPARE_FILES = 32  # descriptors kept for everything but connections


def room_for_connections(wanted: int) -> tuple[int, int]:
    """Return how many connections the limit of open files allows, and how many to accept at once.

    The limit itself is raised first, as far as it may be.

    Raises:
        OptionError: it allows none.
    """
    used = sum(1 for _ in Path("/dev/fd").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Twice the backlog: what is accepted in one go comes before those let go of for it are closed.
    needed = used + SPARE_FILES + 2 * BACKLOG + wanted
    if 0 <= soft < needed:  # infinity is negative
        soft = needed if hard < 0 else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft < 0:
        return wanted, BACKLOG
    free = soft - used - SPARE_FILES
    if free < 4:
        raise OptionError(
            f"only {soft} files may be open at once, which leaves none for connections; raise the "
            f"limit, for example with: ulimit -n {needed}"
        )
    backlog = min(BACKLOG, free // 4)
    return min(wanted, free - 2 * backlog), backlog


class BoundedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, within limits.

    limits: their `max_connections`, and seconds for headers and for silence.
    """

    def __init__(self, *arguments: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.limits = limits
        self.idle_since = 0.0
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        """Tell whether a request is being read or answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self._headers_due = self._later(self.limits.header_time_limit_s, self._no_headers)
        if len(self.connections) > self.limits.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers_due, self._reading_due):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.is_busy:
            self._headers_came()
        elif self._headers_due is None and not self.transport.is_closing():
            # The next request begins, or the body of one that is answered already goes on.
            self._headers_due = self._later(self.limits.header_time_limit_s, self._no_headers)

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()  # may begin the next request, if it has come already
        if self.is_busy:
            self._headers_came()
        elif self.transport.is_closing():
            self.end()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_due = self._later(self.limits.idle_time_limit_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.end()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: an upgrade is an offer, and a server that does not take it need not tell."""

    def send_400_response(self, msg: str) -> None:
        del msg
        self.refuse(ApiError(400, "this is no valid HTTP/1.1 request."))

    def refuse(self, error: ApiError) -> None:
        """Answer with an error, unless another answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            if self.cycle is not None:
                self.cycle.disconnected = True  # what answers this request may not do so any more
            body = json.dumps(error.body()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                *((name.encode(), value.encode()) for name, value in error.headers.items()),
            ]
            reason = HTTPStatus(error.status).phrase.encode()
            response = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.end()

    def end(self) -> None:
        """Close when everything is sent; a client that does not read it is not waited for."""
        self.transport.close()
        self._later(self.limits.idle_time_limit_s, self.transport.abort)

    def _later(self, seconds: float, call: Any) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, call)

    def _headers_came(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _no_headers(self) -> None:
        limit = self.limits.header_time_limit_s
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self.refuse(ApiError(408, f"the headers were not complete within {limit:g} s."))
        else:
            self.end()

    def _make_room(self) -> None:
        """Let go of the connection that has been silent longest, or else of this one."""
        others = [
            one
            for one in cast("set[BoundedConnection]", self.connections)
            if one is not self and not one.is_busy
        ]
        if others:
            oldest = min(others, key=lambda one: one.idle_since)
            self.connections.discard(oldest)
            oldest.transport.abort()
            return
        self.connections.discard(self)
        self.refuse(
            ApiError(
                503,
                f"{self.limits.max_connections} connections are in use; try again later, or start "
                "the server with a larger --max-connections.",
                headers={"Retry-After": "1"},
            )
        )


def log_loop_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Tell in one line a minute, instead of a traceback each, that no connection can be accepted."""
    told = -60.0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal told
        if not context.get("message", "").startswith("socket.accept()"):
            loop.default_exception_handler(context)
        elif loop.time() - told >= 60:
            told = loop.time()
            log.warning("connections cannot be accepted at the moment: %s", context["exception"])

    loop.set_exception_handler(handle)
