"""Starting and stopping: the listening socket, uvicorn, and an orderly end on SIGTERM or Ctrl-C.

signal ──► no new requests ──► answers finish, at most the shutdown limit ──► the rest are
told that the server is closing ──► the engine's thread ends
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ...errors import OptionError
from .limits import Access
from .service import Service

MIN_KEY = 8


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
        found.listen(128)
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
    """Lets answers finish when it is told to stop, and ends those that take too long."""

    def __init__(self, app: ASGIApp, service: Service, log_level: str = "warning") -> None:
        limit = service.limits.shutdown_limit_s
        super().__init__(
            uvicorn.Config(
                app,
                log_level=log_level,
                access_log=log_level in ("debug", "info"),
                server_header=False,
                ws="none",
                lifespan="off",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(limit) + 5,
                backlog=128,
            )
        )
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.engine.close()
        draining = asyncio.ensure_future(self._drain())
        await super().shutdown(sockets)
        draining.cancel()

    async def _drain(self) -> None:
        """Wait until no answer is left, then, or when time is over, end the engine."""
        deadline = time.monotonic() + self.service.limits.shutdown_limit_s
        while time.monotonic() < deadline and not (self.service.engine.idle or self.force_exit):
            await asyncio.sleep(0.05)
        await asyncio.get_running_loop().run_in_executor(None, self.service.engine.stop)


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
