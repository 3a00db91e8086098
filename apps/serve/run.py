"""Starting and stopping: the listening socket, uvicorn, and an orderly end on SIGTERM or Ctrl-C.

signal ──► no new requests ──► answers finish, at most the shutdown limit ──► the rest are
told that the server is closing ──► the engine's thread ends

A second signal goes on to the third step at once, a third one ends the process.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ...errors import OptionError
from .connections import BACKLOG, BoundedConnection, log_loop_errors, room_for_connections
from .limits import Access
from .service import Service

MIN_KEY = 8
LAST_WORDS_S = 2.0  # for sending the last events when the engine has ended


def check_access(host: str, access: Access) -> None:
    """Refuse to serve other machines without a key, and keys that are none.

    Raises:
        OptionError: with what to do instead.
    """
    key = access.api_key
    if key is not None and (len(key) < MIN_KEY or not key.isascii() or not key.isprintable()):
        raise OptionError(
            f"the API key must have at least {MIN_KEY} printable ASCII characters; make one, for "
            "example with: openssl rand -hex 16"
        )
    if key is None and not is_loopback(host):
        raise OptionError(
            f"serving on {host} lets other machines in, which needs an API key; set "
            "SPECSTREAM_API_KEY or --api-key, or keep --host 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach `host`."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        raise OptionError(f"there is no host {host!r} to serve on.") from None
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        OptionError: the port is taken, not allowed, or out of range.
    """
    if not 0 <= port < 2**16:
        raise OptionError(f"--port must be 0 to 65535, got {port}.")
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise OptionError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port."
        ) from None
    return found


def url_of(listening: socket.socket) -> str:
    """Return where a socket can be reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """Lets answers finish when it is told to stop, and ends those that take too long.

    Raises:
        OptionError: there is no room for connections.
    """

    def __init__(self, app: ASGIApp, service: Service, log_level: str = "warning") -> None:
        limits = service.limits
        room, backlog = room_for_connections(limits.max_connections)
        if room < limits.max_connections:
            print(
                f"note: {room} connections at a time instead of {limits.max_connections}, because "
                "so few files may be open at once (ulimit -n)",
                file=sys.stderr,
            )
        connection = partial(BoundedConnection, limits=replace(limits, max_connections=room))
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,  # type: ignore[arg-type]  # what makes one, as a class does
                log_level=log_level,
                access_log=log_level in ("debug", "info"),
                server_header=False,
                ws="none",
                lifespan="off",
                timeout_keep_alive=limits.idle_time_limit_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=int(limits.shutdown_limit_s + LAST_WORDS_S) + 5,
                backlog=backlog,
            )
        )
        self.service = service
        self.hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; at the second signal end the answers, at the third the process."""
        if not self.should_exit:
            super().handle_exit(sig, frame)
        elif not self.hurried:
            self.hurried = True
        else:
            os._exit(128 + sig)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        log_loop_errors(asyncio.get_running_loop())
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)  # who may wait; uvicorn's backlog is who is accepted at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.engine.close()
        draining = asyncio.ensure_future(self._drain())
        await super().shutdown(sockets)
        draining.cancel()

    async def _drain(self) -> None:
        """Wait until no answer is left, then, or when time is over, end the engine."""
        limit, engine = self.service.limits.shutdown_limit_s, self.service.engine
        if not engine.idle:
            print(
                f"finishing the answers under way, at most {limit:g} s; Ctrl-C again ends them",
                file=sys.stderr,
            )
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and not (engine.idle or self.hurried):
            await asyncio.sleep(0.05)
        await asyncio.get_running_loop().run_in_executor(None, engine.stop)
        await asyncio.sleep(LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def serve(app: ASGIApp, service: Service, listening: socket.socket, log_level: str) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit status."""

    def ended(number: int, frame: FrameType | None) -> None:
        """Take the signal that uvicorn sends again when it has shut down."""
        del number, frame

    before = {number: signal.signal(number, ended) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        DrainingServer(app, service, log_level).run(sockets=[listening])
    finally:
        service.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
