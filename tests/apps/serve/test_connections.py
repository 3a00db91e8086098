"""Connections over real sockets: silent ones, slow ones, too many, and what is no HTTP."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_specstream.apps.serve.connections import (
    SPARE_FILES,
    log_loop_errors,
    room_for_connections,
)
from mlx_specstream.apps.serve.limits import Access
from mlx_specstream.apps.serve.run import DrainingServer
from mlx_specstream.errors import OptionError
from tests.apps.serve.conftest import Gate, Live, MakeService, ask

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
GoLive = Callable[..., Live]


def connect(live: Live) -> socket.socket:
    port = int(live.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def all_of(client: socket.socket) -> bytes:
    """Return everything until the server closes."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def one_answer(client: socket.socket) -> bytes:
    """Return the head and the body of one answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(65536)
        assert part, data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = (int(line[16:]) for line in head.split(b"\r\n") if line[:15] == b"content-length:")
    while len(body) < length:
        body += client.recv(65536)
    return head + b"\r\n\r\n" + body


def chat(**fields: Any) -> bytes:
    body = json.dumps(ask(**fields)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def error_of(answer: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return error


@contextmanager
def taking(low: float, high: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert low <= time.monotonic() - began <= high


def test_who_says_nothing_is_let_go(make_service: MakeService, go_live: GoLive) -> None:
    live = go_live(make_service(header_time_limit_s=0.3, idle_time_limit_s=0.3))
    with connect(live) as client, taking(0.2, 5):
        assert all_of(client) == b""
    with connect(live) as client, taking(0.2, 5):  # and one that has asked once
        client.sendall(GET)
        assert one_answer(client).startswith(b"HTTP/1.1 200")
        assert all_of(client) == b""


@pytest.mark.parametrize("before", [b"", GET])
def test_headers_must_come_in_time_however_they_drip(
    make_service: MakeService, go_live: GoLive, before: bytes
) -> None:
    live = go_live(make_service(header_time_limit_s=0.5, idle_time_limit_s=30))
    with connect(live) as client, taking(0.3, 5):
        if before:
            client.sendall(before)
            one_answer(client)
        client.settimeout(0.05)
        answer = b""
        for byte in GET.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 500):
            try:
                client.sendall(bytes([byte]))
                answer += client.recv(65536)
                break
            except TimeoutError:
                continue
        client.settimeout(20)
        answer += all_of(client)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert "0.5 s" in error_of(answer)["message"]


def test_a_body_nobody_reads_may_not_drip_for_ever(
    make_service: MakeService, go_live: GoLive
) -> None:
    live = go_live(make_service(header_time_limit_s=0.3, idle_time_limit_s=0.5))
    with connect(live) as client, taking(0.2, 10):
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n")
        assert one_answer(client).startswith(b"HTTP/1.1 200")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(200):
                client.sendall(b"x")
                time.sleep(0.05)


def test_a_client_that_does_not_read_is_let_go(make_service: MakeService, go_live: GoLive) -> None:
    live = go_live(make_service(idle_time_limit_s=0.4))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(2)
        client.connect(("127.0.0.1", int(live.url.rpartition(":")[2])))
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            while True:  # pipelined, until both buffers are full and the server is tired of it
                client.sendall(GET.replace(b"health", b"openapi.json") * 100)
    until_gone(live)


def until_gone(live: Live) -> None:
    deadline = time.monotonic() + 20
    while live.server.server_state.connections:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_silent_sockets_keep_nobody_out(
    make_service: MakeService, go_live: GoLive, caplog: pytest.LogCaptureFixture
) -> None:
    live = go_live(make_service(max_connections=20))
    with ExitStack() as open_ones:
        silent = [open_ones.enter_context(connect(live)) for _ in range(150)]
        with connect(live) as client:
            client.sendall(GET)
            assert one_answer(client).startswith(b"HTTP/1.1 200")
        assert len(live.server.server_state.connections) <= 20
        assert all_of(silent[0]) == b""  # the first to come is the first to go
    assert caplog.text == ""


def test_connections_that_are_used_are_not_closed_for_others(
    make_service: MakeService, go_live: GoLive, gate: Gate
) -> None:
    live = go_live(make_service(max_connections=2))
    with connect(live) as one, connect(live) as two:
        one.sendall(chat())
        two.sendall(chat())
        deadline = time.monotonic() + 20
        while live.service.engine.active + len(live.service.engine.waiting) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with connect(live) as late:
            answer = all_of(late)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in answer.lower()
            assert "--max-connections" in error_of(answer)["message"]
        gate.open()
        for client in (one, two):
            assert one_answer(client).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(("version", "length"), [("1.1", "Content-Length: 5\r\n"), ("1.0", "")])
@pytest.mark.parametrize("path", ["/health", "/v1/chat/completions", "/nowhere"])
def test_an_ambiguous_length_is_refused_and_the_connection_closed(
    make_service: MakeService, go_live: GoLive, version: str, length: str, path: str
) -> None:
    """What a proxy took for the body must never be read as a request of its own."""
    live = go_live(make_service())
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked = head + length + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with connect(live) as client:
        client.sendall(chunked.encode() + GET)
        answer = all_of(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.lower().count(b"\r\ncontent-length: ") == 1
    if version == "1.1":
        assert "ambiguous" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 100_000,
    ],
)
def test_what_is_no_http_is_refused_as_json(
    make_service: MakeService, go_live: GoLive, data: bytes
) -> None:
    live = go_live(make_service())
    with connect(live) as client:
        client.sendall(data)
        answer = all_of(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert error_of(answer)["type"] == "invalid_request_error"


def test_nonsense_behind_an_answer_hurts_nobody(
    make_service: MakeService, go_live: GoLive, caplog: pytest.LogCaptureFixture
) -> None:
    live = go_live(make_service())
    head = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(live) as client:
        client.sendall(head)
        assert one_answer(client).startswith(b"HTTP/1.1 404 ")
        client.sendall(b"nonsense\r\n")
        assert all_of(client) == b""
    assert "Traceback" not in caplog.text
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_pipelined_requests_are_answered_in_order(
    make_service: MakeService, go_live: GoLive
) -> None:
    live = go_live(make_service(header_time_limit_s=0.5))
    with connect(live) as client:
        client.sendall(chat() + GET + GET.replace(b"health", b"nowhere"))
        data = b""
        while data.count(b"HTTP/1.1 ") < 3 or not data.endswith(b"}"):
            data += client.recv(65536)
    assert [part[:3] for part in data.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404"]


@pytest.mark.parametrize("path", ["/health", "/v1/chat/completions", "/nowhere"])
def test_a_body_nobody_waits_for_is_not_mixed_up_with_the_next_request(
    make_service: MakeService, go_live: GoLive, path: str
) -> None:
    """Who asks whether to send a body, and is refused, may go on without it."""
    live = go_live(make_service(), Access("a-test-key"))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    asking = f"{head}Expect: 100-continue\r\nContent-Length: 50\r\n\r\n"
    with connect(live) as client:
        client.sendall(asking.encode())
        answer = all_of(client)
    assert answer.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 405 "))
    assert b"connection: close" in answer.lower()


def test_a_body_that_is_asked_for_is_read(make_service: MakeService, go_live: GoLive) -> None:
    live = go_live(make_service())
    head, _, body = chat(max_tokens=2).partition(b"\r\n\r\n")
    with connect(live) as client:
        client.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        for data in (body, GET):
            client.sendall(data)
            assert one_answer(client).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_an_upgrade_is_not_taken_and_no_advice_given(
    make_service: MakeService,
    go_live: GoLive,
    protocol: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    live = go_live(make_service())
    offer = f"\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n".encode()
    with connect(live) as client:
        client.sendall(GET.replace(b"\r\n\r\n", offer))
        assert one_answer(client).startswith(b"HTTP/1.1 200")
    assert caplog.text == ""


def test_few_files_make_few_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(Path, "iterdir", lambda _: iter([Path("0")] * 10))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    for limit, found in (
        ((1000, 1000), (512, 128)),
        ((256, 256), (108, 53)),
        ((-1, -1), (512, 128)),
        ((64, 64), (12, 5)),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: limit)
        room, backlog = room_for_connections(512)
        assert (room, backlog) == found
        assert limit[0] < 0 or 10 + SPARE_FILES + room + 2 * backlog <= limit[0]
    assert set_to == [(256, 256), (64, 64)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(OptionError, match="ulimit -n 810"):
        room_for_connections(512)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, -1))
    room_for_connections(512)
    assert set_to[-1] == (810, -1)


def test_no_descriptor_is_a_line_and_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    log_loop_errors(loop)
    for _ in range(100):
        loop.call_exception_handler(
            {
                "message": "socket.accept() out of system resource",
                "exception": OSError(errno.EMFILE, "Too many open files"),
            }
        )
    loop.close()
    assert len(caplog.records) == 1
    assert "Too many open files" in caplog.text


LOW = """
import resource, sys
def refusing(which, limits, real=resource.setrlimit):
    if which == resource.RLIMIT_NOFILE and limits[1] > 1024:
        raise ValueError("not allowed to raise maximum limit")
    real(which, limits)
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 1024))
resource.setrlimit = refusing
from mlx_specstream.cli import main
status = main(["generate", "--model", "/nowhere", "--prompt", "x"])
assert "mlx_lm.utils" in sys.modules
print(resource.getrlimit(resource.RLIMIT_NOFILE))
sys.exit(status)
"""


def test_a_low_hard_limit_of_files_does_not_stop_the_program() -> None:
    """mlx-lm sets the limits to 2048 and 4096 when it is imported, which must be allowed."""
    done = subprocess.run([sys.executable, "-c", LOW], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert done.stdout.strip() == "(1024, 1024)"


def test_the_second_signal_ends_answers_and_tells_their_clients(
    make_service: MakeService, go_live: GoLive, gate: Gate, capfd: pytest.CaptureFixture[str]
) -> None:
    live = go_live(make_service(shutdown_limit_s=60))
    with connect(live) as client:
        client.sendall(chat(stream=True))
        gate.allow(1)
        data = client.recv(65536)
        while b'"content": "' not in data.partition(b"assistant")[2]:
            data += client.recv(65536)
        live.server.handle_exit(2, None)
        time.sleep(0.5)
        live.server.handle_exit(2, None)
        gate.open()
        data += all_of(client)
    assert data.startswith(b"HTTP/1.1 200")
    assert b"shutting down" in data
    assert data.endswith(b"0\r\n\r\n")  # the stream is complete HTTP
    live.thread.join(20)
    assert not live.thread.is_alive()
    said = capfd.readouterr().err
    assert "Ctrl-C again" in said
    assert "Traceback" not in said


def test_a_client_that_hangs_does_not_hold_up_the_end(
    make_service: MakeService, go_live: GoLive
) -> None:
    live = go_live(make_service(header_time_limit_s=60, shutdown_limit_s=60))
    with connect(live) as half, connect(live) as slow, taking(0, 15):
        half.sendall(GET[:20])
        slow.sendall(chat()[:-5])
        time.sleep(0.3)
        live.server.should_exit = True
        live.thread.join(20)
        assert not live.thread.is_alive()


def test_the_third_signal_ends_the_process(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_specstream.apps.serve.app import create_app
    from mlx_specstream.apps.serve.limits import Access

    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    service = make_service()
    server = DrainingServer(create_app(service, Access()), service)
    for _ in range(3):
        server.handle_exit(2, None)
    assert (server.should_exit, server.hurried, server.force_exit) == (True, True, False)
    assert ended == [130]
