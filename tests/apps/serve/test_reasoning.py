"""Models that think: what of their answers is thought, what content, and what holds for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mlx_specstream import load
from tests.apps.parrot import save_parrot
from tests.apps.serve.conftest import CALL, TOOL, MakeService, ask, client_of
from tests.support import tiny

CHAT = "/v1/chat/completions"
THOUGHT = f"Hmm, 你好.\n\nShould I call {CALL}? No."
CONTENT = "It is blue, 👍🏽."
ANSWER = f"<think>\n{THOUGHT}\n</think>\n\n{CONTENT}"
OPENING = tiny.CHAT_TEMPLATE.replace("'<assistant>'", "'<assistant><think>'")
REMEMBERING = tiny.CHAT_TEMPLATE.replace(
    "message['content']",
    "('[' + message.reasoning_content + ']' if message.reasoning_content else '')"
    " + message['content']",
)
MakeThinker = Callable[..., TestClient]


@pytest.fixture(scope="session")
def thinkers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that thinks, with a template that leaves that to it and one that opens the thought."""
    folder = tmp_path_factory.mktemp("thinkers")
    marks = ("<think>", "</think>")
    return {
        "own": save_parrot(folder / "own", ANSWER, marks=marks),
        "opened": save_parrot(folder / "opened", ANSWER, marks=marks, template=OPENING),
    }


@pytest.fixture
def make_thinker(thinkers: dict[str, Path], make_service: MakeService) -> MakeThinker:
    """The maker of clients of one of these models."""

    def make(name: str = "own", **options: Any) -> TestClient:
        config = {"tool_parser_type": "json_tools"}
        service = make_service(
            lambda: load(str(thinkers[name]), tokenizer_config=config), max_tokens=200, **options
        )
        return client_of(service)

    return make


def chunks_of(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("name", ["own", "opened"])
def test_a_thought_is_reasoning_and_no_content(make_thinker: MakeThinker, name: str) -> None:
    client = make_thinker(name)
    body = client.post(CHAT, json=ask(tools=[TOOL])).json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == CONTENT
    assert choice["message"]["reasoning"] == THOUGHT
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    thought = usage["completion_tokens_details"]["reasoning_tokens"]
    assert usage["completion_tokens"] > thought > usage["completion_tokens"] / 2


@pytest.mark.parametrize("name", ["own", "opened"])
def test_deltas_are_of_one_kind_or_the_other(make_thinker: MakeThinker, name: str) -> None:
    client = make_thinker(name)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = chunks_of(client.post(CHAT, json=ask(**options)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == CONTENT
    assert "".join(delta.get("reasoning", "") for delta in deltas) == THOUGHT
    assert usage["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_the_tokens_of_a_thought_are_counted_exactly(make_thinker: MakeThinker) -> None:
    """From its start mark to its end mark."""
    body = make_thinker().post(CHAT, json=ask(logprobs=True)).json()
    tokens = [one["token"] for one in body["choices"][0]["logprobs"]["content"]]
    counted = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert counted == tokens.index("</think>") + 1
    assert body["usage"]["completion_tokens"] == len(tokens)


def test_drafts_are_shown_by_kind(make_thinker: MakeThinker) -> None:
    (choice,) = make_thinker().post(CHAT, json=ask(draft_details=True)).json()["choices"]
    pieces = choice["specstream"]["pieces"]
    assert "".join(one["text"] for one in pieces if "thought" not in one) == CONTENT
    assert "".join(one["text"] for one in pieces if one.get("thought")) == THOUGHT


def test_an_answer_cut_off_in_its_thought_has_no_content(make_thinker: MakeThinker) -> None:
    body = make_thinker().post(CHAT, json=ask(max_tokens=5)).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length"
    assert not choice["message"]["content"]
    assert THOUGHT.startswith(choice["message"]["reasoning"])
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5


@pytest.mark.parametrize("name", ["own", "opened"])
@pytest.mark.parametrize("stop", ["Should", "<tool_call>", "\n\n"])
def test_stop_strings_end_content_alone(make_thinker: MakeThinker, name: str, stop: str) -> None:
    client = make_thinker(name)
    (choice,) = client.post(CHAT, json=ask(stop=[stop, "blue"])).json()["choices"]
    shown = "" if stop == "\n\n" else "It is "  # which stands in front of the content
    assert choice["message"]["content"] == shown
    assert choice["message"]["reasoning"] == THOUGHT
    asked = ask(stop=[stop, "blue"], stop_in_reasoning=True)
    (choice,) = client.post(CHAT, json=asked).json()["choices"]
    assert not choice["message"]["content"]
    assert choice["message"]["reasoning"] == THOUGHT.split(stop)[0].rstrip("\n")
    assert choice["finish_reason"] == "stop"


def test_texts_to_continue_are_not_split(make_thinker: MakeThinker) -> None:
    body = make_thinker().post("/v1/completions", json={"prompt": "<assistant>"}).json()
    assert body["choices"][0]["text"] == ANSWER
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


@pytest.mark.parametrize("name", ["own", "opened"])
def test_a_schema_begins_behind_the_thought(make_thinker: MakeThinker, name: str) -> None:
    pytest.importorskip("llguidance")
    client = make_thinker(name)
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    (choice,) = client.post(CHAT, json=ask(response_format=wanted)).json()["choices"]
    assert choice["message"]["reasoning"] == THOUGHT
    assert choice["message"]["content"] == '{"a": 1}'


@pytest.mark.parametrize("name", ["own", "opened"])
def test_a_forced_call_is_made_behind_the_thought(make_thinker: MakeThinker, name: str) -> None:
    pytest.importorskip("llguidance")
    closed = {"type": "object", "properties": {"a": {"enum": [1]}}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "add", "parameters": closed}}
    body = ask(tools=[tool], tool_choice="required", parallel_tool_calls=False)
    (choice,) = make_thinker(name).post(CHAT, json=body).json()["choices"]
    assert choice["message"]["reasoning"] == THOUGHT
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add"


def test_earlier_thoughts_reach_the_template(thinkers: dict[str, Path]) -> None:
    from mlx_specstream.apps.serve.prompt import PromptEncoder
    from mlx_specstream.apps.serve.schema import parsed_chat

    _, tokenizer = load(str(thinkers["own"]))
    tokenizer._tokenizer.chat_template = REMEMBERING
    encoder = PromptEncoder(tokenizer, len(tokenizer.get_vocab()), None)
    for name in ("reasoning", "reasoning_content"):
        before = {"role": "assistant", "content": "Yes.", name: "Is it?"}
        request = parsed_chat({"messages": [before, {"role": "user", "content": "Sure?"}]})
        text = tokenizer.decode(encoder.chat(request))
        assert text == "<assistant>[Is it?]Yes.<eos><user>Sure?<eos><assistant>"
