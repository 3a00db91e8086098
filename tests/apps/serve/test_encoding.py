"""Prompts and grammars on their way to tokens: long ones, unwanted ones, and early failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from mlx_specstream.apps.serve.errors import ApiError
from mlx_specstream.apps.serve.prompt import PromptEncoder
from mlx_specstream.apps.serve.scheduler import Scheduler
from mlx_specstream.errors import DataError, OptionError
from tests.apps.serve.conftest import Live, MakeService, ask, client_of
from tests.support.tiny import byte_tokenizer

CHAT = "/v1/chat/completions"
GoLive = Callable[..., Live]


def test_a_text_far_too_long_is_not_cut_as_a_whole() -> None:
    encoder = PromptEncoder(byte_tokenizer(), 256, 100)
    lengths: list[int] = []
    encode = encoder.tokenizer.encode

    def counted(text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return encode(text, **options)

    encoder.tokenizer.encode = counted
    from mlx_specstream.apps.serve.schema import parsed_completion

    with pytest.raises(ApiError, match="at most 100 tokens") as refused:
        encoder.completion(parsed_completion({"prompt": "x" * 2**20}))
    assert refused.value.code == "context_length_exceeded"
    assert sum(lengths) <= 2**15
    # What may fit is never refused by counting its parts.
    encoder.max_tokens = 2**17
    (ids,) = encoder.completion(parsed_completion({"prompt": "y" * 2**17}))
    assert len(ids) == 2**17


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_short_prompts_do_not_wait_and_unwanted_ones_are_not_cut(
    make_service: MakeService, go_live: GoLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    release = threading.Event()
    chat = PromptEncoder.chat

    def slow(self: PromptEncoder, request: Any) -> Any:
        text = request.messages[0].content
        begun.append(text[:3])
        if len(text) > 2**16:
            assert release.wait(30)
        return chat(self, request)

    monkeypatch.setattr(PromptEncoder, "chat", slow)
    live = go_live(make_service())
    url = live.url + CHAT

    def leave(name: str) -> None:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(url, json=ask(name + "x" * 2**17), timeout=1)

    try:
        leave("one")
        assert begun == ["one"]  # and is under way still
        leave("two")
        assert httpx2.post(url, json=ask("hey"), timeout=20).status_code == 200
        until(lambda: live.service.reading == 0)
    finally:
        release.set()
    leave_none = httpx2.post(url, json=ask("end" + "x" * 2**17), timeout=20)
    assert leave_none.status_code == 400
    assert begun == ["one", "hey", "end"]  # nobody waited for two


@pytest.mark.parametrize(
    ("error", "status"), [(OptionError("no."), 400), (RuntimeError("private"), 500)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_before_the_first_token_has_a_status(
    make_service: MakeService,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    stream: bool,
) -> None:
    def failing(self: Scheduler, work: Any) -> None:
        raise error

    client = client_of(make_service())
    monkeypatch.setattr(Scheduler, "begin", failing)
    response = client.post(CHAT, json=ask(stream=stream))
    assert response.status_code == status
    assert json.loads(response.text)["error"]["message"]
    assert "private" not in response.text


def test_a_grammar_too_large_is_blamed_on_itself(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    client = client_of(make_service())
    properties = {f"p{i}": {"type": "string"} for i in range(20000)}
    schema = {"type": "object", "properties": properties}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    response = client.post(CHAT, json=ask(response_format=wanted, stream=True))
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "too large" in message
    assert "processor" not in message


def test_a_matcher_that_gave_up_says_why() -> None:
    pytest.importorskip("llguidance")
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_specstream.generation.grammar import Grammar
    from tests.support.tiny import hf_byte_tokenizer

    grammar = Grammar.regex(TokenizerWrapper(hf_byte_tokenizer()), "ab", 300)
    processor = grammar.processor()

    class Exhausted:
        def try_consume_tokens(self, tokens: Any) -> int:
            return 0

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "fuel is exhausted"

    processor.begin(0)
    processor._matcher = Exhausted()
    with pytest.raises(DataError, match="too complex for llguidance: fuel is exhausted; use a"):
        processor._go_to([97])
