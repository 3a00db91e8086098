"""Clients that leave, crowds, and slow answers: through the whole server, with the model held."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from mlx_specstream.apps.serve.service import Service
from tests.apps.serve.conftest import Gate, Live, MakeService, ask

CHAT = "/v1/chat/completions"
# Of each API that answers chats: its path, what counts it, and a request.
APIS = {
    "chat": (CHAT, ask()),
    "responses": ("/v1/responses", {"input": "hello"}),
    "messages": ("/v1/messages", {**ask(), "max_tokens": 500}),
}
GoLive = Callable[..., Live]


def until(condition: Callable[[], bool], limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def count(service: Service, line: str) -> bool:
    return line in service.metrics.text().decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_costing(
    make_service: MakeService, go_live: GoLive, gate: Gate, stream: bool
) -> None:
    service = make_service(max_tokens=200, decode_concurrency=1, max_queue=1)
    live = go_live(service)

    async def leave() -> None:
        async with httpx2.AsyncClient(base_url=live.url) as client:
            tasks = [
                asyncio.ensure_future(client.post(CHAT, json=ask(text, stream=stream)))
                for text in ("one", "two")
            ]
            while not (service.engine.active == 1 and len(service.engine.waiting) == 1):
                await asyncio.sleep(0.005)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(leave())
    until(lambda: not service.engine.waiting)  # the one in line goes without a step
    gate.allow(5)
    until(lambda: service.engine.idle)
    until(lambda: count(service, 'specstream_requests_total{endpoint="chat",status="499"} 2.0'))
    gate.open()
    assert httpx2.post(live.url + CHAT, json=ask(max_tokens=3)).status_code == 200


@pytest.mark.parametrize("api", ["responses", "messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_of_another_api_that_leaves_stops_costing(
    make_service: MakeService, go_live: GoLive, gate: Gate, api: str, stream: bool
) -> None:
    service = make_service(max_tokens=200)
    live = go_live(service)
    path, body = APIS[api]

    async def leave() -> None:
        async with httpx2.AsyncClient(base_url=live.url) as client:
            task = asyncio.ensure_future(client.post(path, json={**body, "stream": stream}))
            while service.engine.active == 0:
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    gate.allow(5)
    until(lambda: service.engine.idle)
    line = f'specstream_requests_total{{endpoint="{api}",status="499"}} 1.0'
    until(lambda: count(service, line))


def test_a_full_queue_is_429_and_the_others_are_answered(
    make_service: MakeService, go_live: GoLive, gate: Gate
) -> None:
    service = make_service(decode_concurrency=2, max_queue=1)
    live = go_live(service)

    async def crowd() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=live.url, timeout=60) as client:
            tasks = [asyncio.ensure_future(client.post(CHAT, json=ask(str(n)))) for n in range(7)]
            while sum(task.done() for task in tasks) < 4:
                await asyncio.sleep(0.01)
            gate.open()
            return list(await asyncio.gather(*tasks))

    responses = asyncio.run(crowd())
    assert sorted(response.status_code for response in responses) == [200] * 3 + [429] * 4
    for response in responses:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"


def test_short_answers_do_not_wait_for_long_ones(
    make_service: MakeService, go_live: GoLive
) -> None:
    live = go_live(make_service(max_tokens=300))
    with httpx2.stream("POST", live.url + CHAT, json=ask(stream=True), timeout=60) as long:
        lines = long.iter_lines()
        next(lines)
        began = time.monotonic()
        short = httpx2.post(live.url + CHAT, json=ask("other", max_tokens=2), timeout=60)
        took = time.monotonic() - began
        rest = [line for line in lines if line.startswith("data: {")]
        total = time.monotonic() - began
    assert short.status_code == 200
    assert len(rest) > 30  # passes
    assert took < total


def test_answers_that_share_the_model_are_not_mixed_up(
    make_service: MakeService, go_live: GoLive
) -> None:
    live = go_live(make_service(decode_concurrency=4, max_tokens=40))
    prompts = [f"{'prompt ' * (n % 3)}{n}" for n in range(6)]

    def body(prompt: str, n: int) -> dict[str, Any]:
        drawn = {"temperature": 1.0, "seed": n} if n % 2 else {}
        return ask(prompt, **drawn)

    alone = [
        httpx2.post(live.url + CHAT, json=body(p, n), timeout=60).json()
        for n, p in enumerate(prompts)
    ]

    async def together() -> list[Any]:
        async with httpx2.AsyncClient(base_url=live.url, timeout=60) as client:
            tasks = [client.post(CHAT, json=body(p, n)) for n, p in enumerate(prompts)] * 1
            return [response.json() for response in await asyncio.gather(*tasks)]

    for one, other in zip(alone, asyncio.run(together()), strict=True):
        assert one["choices"] == other["choices"]


def test_an_answer_out_of_time_is_cut(
    make_service: MakeService, go_live: GoLive, gate: Gate
) -> None:
    live = go_live(make_service(time_limit_s=0.5, decode_concurrency=1))
    gate.allow(3)

    async def slow() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=live.url, timeout=60) as client:
            tasks = [asyncio.ensure_future(client.post(CHAT, json=ask(str(n)))) for n in range(2)]
            await asyncio.sleep(0.8)
            gate.allow(1)
            return list(await asyncio.gather(*tasks))

    cut, never = sorted(asyncio.run(slow()), key=lambda response: response.status_code)
    assert cut.json()["choices"][0]["finish_reason"] == "length"
    assert 1 <= cut.json()["usage"]["completion_tokens"] < 16
    assert never.status_code == 503


def test_a_slow_request_is_given_up(make_service: MakeService, go_live: GoLive) -> None:
    live = go_live(make_service(body_time_limit_s=0.3))

    async def drip() -> bytes:
        host, port = live.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return answer

    answer = asyncio.run(drip())
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "timeout_error"


def test_signs_of_life_while_an_answer_waits(
    make_service: MakeService, go_live: GoLive, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_specstream.apps.serve.answering.KEEP_ALIVE_S", 0.05)
    live = go_live(make_service())
    with httpx2.stream("POST", live.url + CHAT, json=ask(stream=True), timeout=60) as response:
        lines = response.iter_lines()
        assert any(line == ": still here" for line in lines)
        gate.open()
        assert any(line == "data: [DONE]" for line in lines)


@pytest.mark.parametrize("api", APIS)
def test_stopping_lets_answers_finish_and_tells_the_rest(
    make_service: MakeService, go_live: GoLive, gate: Gate, api: str
) -> None:
    service = make_service(shutdown_limit_s=0.5, max_tokens=500)
    live = go_live(service)
    path, body = APIS[api]
    body = {**body, "stream": True}
    with httpx2.stream("POST", live.url + path, json=body, timeout=60) as response:
        lines = response.iter_lines()
        until(lambda: service.engine.active == 1)
        live.server.should_exit = True
        until(lambda: not service.engine.healthy)
        time.sleep(0.6)
        gate.allow(2)
        *_, last = [line for line in lines if line]
        told = json.loads(last.removeprefix("data: "))
        assert told.get("response", told)["error"]["message"].startswith("the server")
        assert told.get("type") == {"responses": "response.failed", "messages": "error"}.get(api)
    live.thread.join(30)
    assert not live.thread.is_alive()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(live.url + "/health")


def test_stopping_waits_for_answers(make_service: MakeService, go_live: GoLive, gate: Gate) -> None:
    service = make_service(shutdown_limit_s=20)
    live = go_live(service)
    with httpx2.stream("POST", live.url + CHAT, json=ask(stream=True), timeout=60) as response:
        until(lambda: service.engine.active == 1)
        live.server.should_exit = True
        until(lambda: not service.engine.healthy)
        gate.open()
        *_, last = [line for line in response.iter_lines() if line]
    assert last == "data: [DONE]"
    live.thread.join(30)
    assert not live.thread.is_alive()
