"""Hostile texts and schemas are given up in time, and hold nobody up meanwhile."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mlx_specstream import load
from mlx_specstream.apps.serve import grammars, tool_calls
from mlx_specstream.apps.serve.timed import FailedError, OutOfTimeError, TimedProcess
from tests.apps.parrot import save_parrot
from tests.apps.serve.conftest import TOOL, Live, MakeService, ask, client_of
from tests.apps.serve.test_tool_calls import FORMATS, TOOLS, form_of, read

CHAT = "/v1/chat/completions"
GEMMA = {"parser": "mlx_lm.tool_parsers.gemma4", "tools": []}
ENDLESS = "call:f{" * 3000  # for gemma4's parser; an hour or so
NASTY = {"allOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(1, 30)]}


@pytest.fixture
def process() -> Iterator[TimedProcess]:
    made = TimedProcess("calls")
    made.ask({**GEMMA, "text": "call:f{}"}, 60)  # begun
    yield made
    made.close()


def test_work_is_ended_in_time_and_the_next_is_done(process: TimedProcess) -> None:
    began = time.monotonic()
    with pytest.raises(OutOfTimeError):
        process.ask({**GEMMA, "text": ENDLESS}, 0.5)
    assert time.monotonic() - began < 20
    found = process.ask({**GEMMA, "text": "call:f{a:1}"}, 60)
    assert found == {"name": "f", "arguments": {"a": 1}}
    with pytest.raises(FailedError, match="ValueError"):
        process.ask({**GEMMA, "text": "oops"}, 60)
    assert copy.deepcopy(process)._process is None


def test_a_process_that_died_is_begun_anew(process: TimedProcess) -> None:
    process.close()
    with pytest.raises(OutOfTimeError):
        process.ask({**GEMMA, "text": "call:f{}"}, 60)
    assert process.ask({**GEMMA, "text": "call:f{}"}, 60) == {"name": "f", "arguments": {}}


@pytest.mark.parametrize("name", FORMATS)
def test_long_calls_are_read_as_short_ones(
    process: TimedProcess, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    form, (good, bad) = form_of(name), FORMATS[name]
    monkeypatch.setattr(tool_calls, "_SHORT", -1)
    timed = form.within_time(process)
    for inner in [good, *bad]:
        whole = f"a{form.start}{inner}{form.end}"
        found, expected = (read(one, [whole], TOOLS) for one in (timed, form))
        assert found[0] == expected[0]
        assert [(c.name, c.arguments) for c in found[1]] == [
            (c.name, c.arguments) for c in expected[1]
        ]


def test_a_call_that_takes_too_long_to_read_is_text_and_holds_nobody_up(
    tmp_path: Path,
    make_service: MakeService,
    go_live: Callable[..., Live],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool_calls, "LIMIT_S", 3.0)
    form = form_of("gemma4")
    written = f"{form.start}{ENDLESS}{form.end}"
    folder = save_parrot(tmp_path / "caller", written)
    live = go_live(
        make_service(
            lambda: load(str(folder), tokenizer_config={"tool_parser_type": "gemma4"}),
            max_tokens=2000,
        )
    )
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(httpx2.post, live.url + CHAT, json=ask(tools=[TOOL]), timeout=120)
        waits = []
        while not asked.done():
            began = time.monotonic()
            assert httpx2.get(live.url + "/health", timeout=60).status_code == 200
            waits.append(time.monotonic() - began)
            time.sleep(0.05)
        (choice,) = asked.result().json()["choices"]
    assert choice["message"]["content"] == written
    assert choice["finish_reason"] == "stop"
    assert max(waits) < 2.5  # less than reading was given


def test_a_schema_that_takes_too_long_is_refused(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr(grammars, "LIMIT_S", 1.0)
    client = client_of(make_service())

    def answer(schema: Any, **fields: Any) -> Any:
        wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
        return client.post(CHAT, json=ask(response_format=wanted, **fields))

    for stream in (False, True):
        response = answer(NASTY, stream=stream)
        assert response.status_code == 400
        error = response.json()["error"]
        assert "more than 1 s to compile" in error["message"]
        assert error["param"] == "response_format"
    assert answer({"type": "object"}).status_code == 200


def test_a_grammar_is_compiled_once(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    service = make_service()
    store = service.slow_encoder.grammars
    rules = [f'start: "{place}"' for place in range(grammars.KEPT + 1)]
    first = store.lark(rules[0])
    assert store.lark(rules[0]) is first
    for one in rules[1:]:
        store.lark(one)
    assert store.lark(rules[-1]) is store.lark(rules[-1])
    assert store.lark(rules[0]) is not first
