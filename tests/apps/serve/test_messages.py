"""Anthropic's Messages API in this process: events, blocks, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from mlx_specstream.apps.serve.limits import Access
from mlx_specstream.apps.serve.messages.request import parsed_message
from tests.apps.parrot import ANSWER
from tests.apps.serve.conftest import TOOL, MakeService, client_of
from tests.apps.serve.test_responses import named_events

MESSAGES = "/v1/messages"
PARAMETERS = TOOL["function"]["parameters"]  # type: ignore[index]
ADD = {"name": "add", "description": "Add.", "input_schema": PARAMETERS}


def ask(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"max_tokens": 16, "messages": [{"role": "user", "content": text}], **fields}


def said(role: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}


def chat_of(**fields: Any) -> Any:
    return parsed_message(ask(**fields))


def test_a_text_is_one_block(make_service: MakeService, talker: Any) -> None:
    client = client_of(make_service(talker))
    made = client.post(MESSAGES, json=ask(max_tokens=500)).json()
    assert made["content"] == [{"type": "text", "text": ANSWER}]
    assert (made["type"], made["role"]) == ("message", "assistant")
    assert (made["stop_reason"], made["stop_sequence"]) == ("end_turn", None)
    again = client.post(MESSAGES, json=ask(max_tokens=500)).json()
    usage = again["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (1, 7)
    assert usage["output_tokens"] == made["usage"]["output_tokens"]


def test_a_stream_of_text_and_a_call(make_service: MakeService, caller: Any) -> None:
    client = client_of(make_service(caller))
    body = ask(max_tokens=200, tools=[ADD])
    events = named_events(client.post(MESSAGES, json={**body, "stream": True}))
    kinds = [event["type"] for event in events]
    deltas = kinds.count("content_block_delta") - 1
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert [event.get("index") for event in events[1:-2]] == [0] * (deltas + 2) + [1] * 3
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"]["input_tokens"] == 8
    whole = client.post(MESSAGES, json=body).json()
    words = "".join(event["delta"]["text"] for event in events[2 : 2 + deltas])
    assert whole["content"][0]["text"] == words == "Let me see.\n"
    use = whole["content"][1]
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "add", {"a": 1, "b": "ü"})
    assert json.loads(events[-4]["delta"]["partial_json"]) == use["input"]
    assert whole["stop_reason"] == events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    # What was sent is understood when it is sent back, with the call's result.
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [text("3")]}
    turns = [*body["messages"], said("assistant", *whole["content"]), said("user", result)]
    assert client.post(MESSAGES, json={**body, "messages": turns}).status_code == 200


def test_why_an_answer_ended(make_service: MakeService, talker: Any) -> None:
    client = client_of(make_service(talker))
    cut = client.post(MESSAGES, json=ask(max_tokens=3)).json()
    assert (cut["stop_reason"], cut["usage"]["output_tokens"]) == ("max_tokens", 3)
    stopped = client.post(MESSAGES, json=ask(max_tokens=500, stop_sequences=["never", "like"]))
    made = stopped.json()
    assert (made["stop_reason"], made["stop_sequence"]) == ("stop_sequence", "like")
    assert made["content"][0]["text"] == ANSWER[: ANSWER.index("like")]
    unused = client.post(MESSAGES, json=ask(max_tokens=500, stop_sequences=["never"])).json()
    assert (unused["stop_reason"], unused["stop_sequence"]) == ("end_turn", None)


def test_blocks_become_messages() -> None:
    use = {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "3", "is_error": False}
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    document = {"type": "document", "source": {"type": "text", "data": "A page."}}
    messages = chat_of(
        system=[text("Be "), text("kind.")],
        messages=[
            {"role": "user", "content": "add"},
            said("assistant", thought, {"type": "redacted_thinking", "data": "x"}, text("S"), use),
            said("user", text("and "), result, document),
            said("assistant", text("Four.")),
            said("user", {**result, "content": None}),
        ],
    ).messages
    assert [(one.role, one.content) for one in messages] == [
        ("system", "Be kind."),
        ("user", "add"),
        ("assistant", "S"),
        ("tool", "3"),
        ("user", "and A page."),
        ("assistant", "Four."),
        ("tool", ""),
    ]
    (called,) = messages[2].tool_calls
    assert (called.id, called.function.arguments) == ("1", '{"a": 1}')
    assert messages[3].tool_call_id == "1"


def test_fields_become_those_of_a_chat() -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": wanted}}, {"output_format": wanted}):
        chat = chat_of(**fields)
        assert chat.response_format.json_schema.schema_ == schema
    chat = chat_of(stop_sequences=["x"], top_k=3, n=2, thinking={"type": "disabled"})
    assert (chat.max_tokens, chat.stop, chat.top_k, chat.n) == (16, ["x"], 3, None)
    assert chat.chat_template_kwargs == {"enable_thinking": False}
    thinks = chat_of(thinking={"type": "enabled", "budget_tokens": 1024})
    assert thinks.chat_template_kwargs == {"enable_thinking": True}
    own = chat_of(thinking={"type": "adaptive"}, chat_template_kwargs={"enable_thinking": False})
    assert own.chat_template_kwargs == {"enable_thinking": False}
    choices = {"auto": "auto", "any": "required", "none": "none"}
    for kind, meant in choices.items():
        chat = chat_of(tools=[ADD], tool_choice={"type": kind, "disable_parallel_tool_use": True})
        assert (chat.tool_choice, chat.parallel_tool_calls) == (meant, False)
    chat = chat_of(tools=[ADD], tool_choice={"type": "tool", "name": "add"})
    assert (chat.tool_choice.function.name, chat.parallel_tool_calls) == ("add", True)
    assert chat.tools[0].function.parameters == PARAMETERS


def test_tokens_are_counted(client: TestClient) -> None:
    body = ask("hello", system="Be kind.", tools=[ADD])
    del body["max_tokens"]
    counted = client.post(f"{MESSAGES}/count_tokens", json=body).json()
    made = client.post(MESSAGES, json={**body, "max_tokens": 1}).json()
    assert counted == {"input_tokens": made["usage"]["input_tokens"]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}
PDF = {"type": "document", "source": {"type": "base64", "data": "x"}}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "max_tokens: the field is missing"),
        (ask(messages=[]), "messages"),
        (ask(messages=[said("user", IMAGE)]), "messages.0.content.0: 'image' cannot be read"),
        (ask(messages=[said("user", PDF)]), "'document' cannot be read"),
        (ask(messages=[said("user", USE)]), "'tool_use' is not supported"),
        (ask(messages=[said("user", {"type": "tool_result"})]), "tool_use_id"),
        (ask(system=[IMAGE]), "system.0: 'image' cannot"),
        (ask(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "not supported"),
        (ask(tools=[{"name": "add"}]), "tools.0.input_schema"),
        (ask(tool_choice={"type": "any"}), "no tools"),
        (ask(tools=[ADD], tool_choice={"type": "tool"}), "needs the name"),
        (ask(stop_sequences=["x"] * 300), "stop_sequences"),
        (ask(mcp_servers=[{"url": "x"}]), "mcp_servers is not supported"),
        (ask(temperature="1"), "temperature"),
        (ask(thinking={"type": "enabled"}, chat_template_kwargs=[None]), "chat_template_kwargs"),
        (ask("x" * 600), "prompt is too long: "),
    ],
)
def test_what_makes_no_sense_is_refused(
    client: TestClient, body: dict[str, Any], words: str
) -> None:
    response = client.post(MESSAGES, json=body)
    assert response.status_code == 400, response.text
    error = response.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert words in error["error"]["message"]


@pytest.mark.parametrize(
    "thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}]
)
def test_conversations_that_the_server_would_keep_are_refused(
    client: TestClient, thread: dict[str, str]
) -> None:
    """Not ignored: the next request would hold the newest turn alone."""
    refused = client.post(MESSAGES, json=ask(thread=thread))
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["details"] == {"error_code": "thread_unsupported_request"}
    assert "whole conversation" in error["message"]
    assert client.post(MESSAGES, json=ask(thread=None)).status_code == 200


def test_all_errors_have_anthropics_form(make_service: MakeService) -> None:
    service = make_service(max_body_bytes=2000)
    client = client_of(service, Access("the-key"))
    key = {"x-api-key": "the-key"}
    found = {
        "authentication_error": client.post(MESSAGES, json=ask()),
        "not_found_error": client.post(MESSAGES, json=ask(model="gpt"), headers=key),
        "request_too_large": client.post(MESSAGES, json=ask("x" * 3000), headers=key),
        "invalid_request_error": client.get(MESSAGES, headers=key),
        "permission_error": client.post(MESSAGES, json=ask(), headers={**key, "host": "evil.com"}),
    }
    for kind, response in found.items():
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] == kind
    assert client.post(MESSAGES, json=ask(), headers=key).status_code == 200
    assert client.post(MESSAGES, json=ask(), headers={"x-api-key": "other"}).status_code == 401
    bearer = {"Authorization": "Bearer the-key"}
    assert client.post(MESSAGES, json=ask(), headers=bearer).status_code == 200
    # The other paths keep OpenAI's form.
    assert set(client.get("/v1/models").json()) == {"error"}


@pytest.mark.parametrize(
    ("last", "continues"),
    [
        ({"role": "assistant", "content": "Let me"}, True),
        ({"role": "assistant", "content": [{"type": "text", "text": "Let me"}]}, True),
        ({"role": "assistant", "content": ""}, None),
        (
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "a", "name": "add", "input": {}}],
            },
            None,
        ),
        ({"role": "user", "content": "and?"}, None),
    ],
)
def test_an_answer_goes_on_where_the_last_turn_is_the_assistants(
    last: dict[str, Any], continues: bool | None
) -> None:
    turns = [{"role": "user", "content": "hello"}, last]
    wanted = parsed_message({"max_tokens": 8, "messages": turns})
    assert wanted.continue_final_message is continues


@pytest.mark.parametrize("given", ["some text", [1], 7, None, "{oops"])
def test_a_call_is_taken_back_whatever_the_model_wrote(given: Any) -> None:
    use = {"type": "tool_use", "id": None, "name": None, "input": given}
    result = {"type": "tool_result", "tool_use_id": None, "content": {"a": 1}}
    chat = chat_of(messages=[said("assistant", use), said("user", result)])
    ((call,), told) = chat.messages[0].tool_calls, chat.messages[1].content
    assert call.function.name == ""
    assert call.function.arguments == (
        given if isinstance(given, str | None) else json.dumps(given)
    )
    assert told == '{"a": 1}'
