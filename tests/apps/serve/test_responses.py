"""OpenAI's Responses API in this process: events, items, the store, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from mlx_specstream.apps.serve.errors import ApiError
from mlx_specstream.apps.serve.responses.request import parsed_response
from mlx_specstream.apps.serve.responses.store import ResponseStore
from tests.apps.parrot import ANSWER
from tests.apps.serve.conftest import TOOL, MakeService, client_of

RESPONSES = "/v1/responses"
ADD = {"type": "function", **TOOL["function"]}
ARGUMENTS = '{"a": 1, "b": "ü"}'


def named_events(response: Any) -> list[dict[str, Any]]:
    """Return a stream's objects, each of which is named by its type."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for part in response.text.split("\n\n"):
        if part:
            name, data = part.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def call(name: str = "call_1") -> dict[str, Any]:
    return {"type": "function_call", "call_id": name, "name": "add", "arguments": '{"a": 1}'}


def output(name: str = "call_1", text: Any = "3") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": name, "output": text}


def chat_of(**fields: Any) -> Any:
    return parsed_response(fields, ResponseStore()).chat


def test_a_text_is_one_message(make_service: MakeService, talker: Any) -> None:
    client = client_of(make_service(talker, max_tokens=500))
    made = client.post(RESPONSES, json={"input": "hello", "metadata": {"a": "b"}}).json()
    (item,) = made["output"]
    assert item["type"] == "message"
    (part,) = item["content"]
    assert part == {"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}
    assert (made["object"], made["status"], made["error"]) == ("response", "completed", None)
    assert made["metadata"] == {"a": "b"}
    usage = made["usage"]
    assert usage["input_tokens"] == 8
    assert usage["total_tokens"] == 8 + usage["output_tokens"]
    assert usage["output_tokens_details"]["accepted_prediction_tokens"] > 20
    chat = client.post("/v1/chat/completions", json={"messages": [user("hello")]}).json()
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]


def test_a_stream_of_text_and_a_call(make_service: MakeService, caller: Any) -> None:
    client = client_of(make_service(caller, max_tokens=200))
    events = named_events(
        client.post(RESPONSES, json={"input": "hello", "tools": [ADD], "stream": True})
    )
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    text = "".join(event["delta"] for event in events if event["type"].endswith("text.delta"))
    assert text == "Let me see.\n"
    last = events[-1]["response"]
    message, made = last["output"]
    assert message["content"][0]["text"] == text
    assert events[-2]["item"] == made
    assert (made["name"], made["arguments"], made["status"]) == ("add", ARGUMENTS, "completed")
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["usage"] is None
    whole = client.post(RESPONSES, json={"input": "hello", "tools": [ADD]}).json()
    differing = {name for name in last if last[name] != whole[name]}
    assert differing <= {"id", "created_at", "completed_at", "output", "usage"}
    assert [item["type"] for item in whole["output"]] == ["message", "function_call"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_is_incomplete(client: TestClient, stream: bool) -> None:
    body = {"input": "hello", "max_output_tokens": 3, "stream": stream}
    response = client.post(RESPONSES, json=body)
    if stream:
        last = named_events(response)[-1]
        assert last["type"] == "response.incomplete"
        made = last["response"]
    else:
        made = response.json()
    assert made["status"] == "incomplete"
    assert made["incomplete_details"] == {"reason": "max_output_tokens"}
    assert made["output"][-1]["status"] == "incomplete"
    assert made["usage"]["output_tokens"] == 3
    assert made["max_output_tokens"] == 3


def test_logprobs(client: TestClient) -> None:
    include = ["message.output_text.logprobs"]
    body = {"input": "hello", "max_output_tokens": 5, "top_logprobs": 2, "include": include}
    made = client.post(RESPONSES, json=body).json()
    logprobs = made["output"][0]["content"][0]["logprobs"]
    assert [len(one["top_logprobs"]) for one in logprobs] == [2] * 5
    events = named_events(client.post(RESPONSES, json={**body, "stream": True}))
    streamed = [
        one["token"]
        for event in events
        if event["type"] == "response.output_text.delta"
        for one in event["logprobs"]
    ]
    assert streamed == [one["token"] for one in logprobs]


def test_a_schema_is_fitted(client: TestClient) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ann", "bob"]}},
        "required": ["name"],
        "additionalProperties": False,
    }
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    bias = {"125": 50, "32": -100, "10": -100, "13": -100, "9": -100}
    body = {"input": "hello", "text": wanted, "logit_bias": bias, "max_output_tokens": 80}
    made = client.post(RESPONSES, json=body).json()
    assert json.loads(made["output"][0]["content"][0]["text"])["name"] in ("ann", "bob")
    assert made["text"]["format"]["schema"] == schema


def test_items_become_messages() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", **user("add")},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "S"}]},
        call("1"),
        call("2"),
        output("1"),
        output("2", [{"type": "input_text", "text": "four"}]),
        user("and?"),
    ]
    messages = chat_of(input=items, instructions="Be kind.").messages
    assert [(one.role, one.content) for one in messages] == [
        ("system", "Be kind.\n\nBe brief."),
        ("user", "add"),
        ("assistant", "S"),
        ("tool", "3"),
        ("tool", "four"),
        ("user", "and?"),
    ]
    assert [one.id for one in messages[2].tool_calls] == ["1", "2"]
    assert [one.tool_call_id for one in messages[3:5]] == ["1", "2"]


def test_fields_become_those_of_a_chat() -> None:
    chat = chat_of(
        input="x",
        max_output_tokens=5,
        temperature=0.5,
        top_k=7,
        n=3,
        tools=[ADD, {**ADD, "name": "sub"}],
        tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"name": "sub"}]},
        parallel_tool_calls=False,
    )
    assert (chat.max_completion_tokens, chat.temperature, chat.top_k) == (5, 0.5, 7)
    assert chat.n is None
    assert [tool.function.name for tool in chat.tools] == ["sub"]
    assert (chat.tool_choice, chat.parallel_tool_calls) == ("required", False)
    named = chat_of(input="x", tools=[ADD], tool_choice={"type": "function", "name": "add"})
    assert named.tool_choice.function.name == "add"


def test_a_conversation_goes_on_by_id(client: TestClient) -> None:
    body = {"input": "one", "instructions": "Be brief.", "previous_response_id": ""}
    first = client.post(RESPONSES, json=body).json()
    name, (item,) = first["id"], first["output"]
    body = {"input": "two", "previous_response_id": name}
    second = client.post(RESPONSES, json=body).json()
    assert second["previous_response_id"] == name
    whole = [user("one"), item, user("two")]
    by_hand = client.post(RESPONSES, json={"input": whole}).json()
    assert by_hand["usage"]["input_tokens"] == second["usage"]["input_tokens"]
    assert by_hand["output"][0]["content"] == second["output"][0]["content"]
    # Clients that count on the store send references in place of items, with and without a type.
    for reference in ({"type": "item_reference", "id": item["id"]}, {"id": item["id"]}):
        referring = {"input": [user("one"), reference, user("two")]}
        again = client.post(RESPONSES, json=referring).json()
        assert again["usage"]["input_tokens"] == second["usage"]["input_tokens"]
    third = client.post(RESPONSES, json={"input": "x", "previous_response_id": second["id"]}).json()
    whole += [second["output"][0], user("x")]
    by_hand = client.post(RESPONSES, json={"input": whole}).json()
    assert by_hand["usage"]["input_tokens"] == third["usage"]["input_tokens"]


def test_stored_responses_can_be_read_and_deleted(client: TestClient) -> None:
    made = client.post(RESPONSES, json={"input": "one"}).json()
    path = f"{RESPONSES}/{made['id']}"
    assert client.get(path).json() == made
    assert client.delete(path).json() == {"id": made["id"], "object": "response", "deleted": True}
    assert client.get(path).status_code == 404
    assert client.delete(path).status_code == 404
    kept_not = client.post(RESPONSES, json={"input": "one", "store": False}).json()
    assert client.get(f"{RESPONSES}/{kept_not['id']}").status_code == 404
    for body in (
        {"input": "x", "previous_response_id": made["id"]},
        {"input": [{"type": "item_reference", "id": made["output"][0]["id"]}]},
    ):
        refused = client.post(RESPONSES, json=body)
        assert refused.status_code == 400
        assert "in memory" in refused.json()["error"]["message"]


def test_the_store_forgets_what_was_used_longest_ago() -> None:
    def made(name: str, before: str | None = None) -> dict[str, Any]:
        item = {**call(), "id": f"fc_{name}", "arguments": "x" * 1000}
        return {"id": name, "previous_response_id": before, "output": [item]}

    store = ResponseStore(5000)
    for name, before in (("a", None), ("b", "a"), ("c", None), ("d", None)):
        store.put(made(name, before), [])
    assert len(store.conversation("b")) == 2  # used now, with what it continues
    store.put(made("e"), [])
    assert store.nbytes <= 5000
    assert [store.get(name)["id"] for name in "abde"] == list("abde")
    with pytest.raises(ApiError, match="oldest"):
        store.get("c")
    with pytest.raises(ApiError, match="no item 'fc_c'"):
        store.referred({"type": "item_reference", "id": "fc_c"}, 0)
    store.delete("a")
    with pytest.raises(ApiError, match="no response 'a'"):
        store.conversation("b")
    store.put(made("huge") | {"text": "x" * 6000}, [])
    assert store.nbytes == 0


IMAGE = {"type": "input_image", "image_url": "data:,"}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "nothing to answer"),
        ({"input": []}, "input", "nothing to answer"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input", "input.0.content.0: 'input_"),
        ({"input": [output(text=[IMAGE])]}, "input", "input.0.output.0: 'input_image' cannot"),
        ({"input": [{"type": "web_search_call"}]}, "input", "'web_search_call' is not supported"),
        ({"input": [{"type": "function_call"}]}, "input", "input.0.call_id"),
        ({"input": [{"type": 3}]}, "input", "type must be text"),
        ({"input": [{}]}, "input", "input.0: its type is missing"),
        ({"input": [None]}, "input", "input.0: each part must be an object"),
        ({"input": [{"role": "user", "content": 3}]}, "input", "text or a list"),
        ({"input": [{"role": "user", "content": [3]}]}, "input", "must be an object"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools", "'web_search' is not"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools", "tools.0.name"),
        ({"input": "x", "tools": [{"type": 3}]}, "tools", "tools.0: the type must be text"),
        (
            {"input": "x", "tool_choice": {"type": "allowed_tools", "mode": "x", "tools": []}},
            "tool_choice",
            "the mode",
        ),
        ({"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice", "allowed_tools"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"input": "x", "background": True}, "background", "wait, or stream"),
        ({"input": "x", "conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
        ({"input": "x", "temperature": "1"}, "temperature", "temperature"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format", "a schema"),
        ({"input": "x" * 600}, "input", "tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(
    client: TestClient, body: dict[str, Any], param: str, words: str
) -> None:
    response = client.post(RESPONSES, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_what_is_not_there(client: TestClient) -> None:
    refused = client.post("/v1/embeddings", json={"input": "x"})
    assert refused.status_code == 404
    assert "llama-server --embeddings" in refused.json()["error"]["message"]
    assert client.get(RESPONSES).status_code == 405
    assert client.post(RESPONSES, json={"input": "x", "model": "gpt"}).status_code == 404


def test_requests_are_counted(client: TestClient) -> None:
    client.post(RESPONSES, json={"input": "one"})
    line = 'specstream_requests_total{endpoint="responses",status="200"} 1.0'
    assert line in client.get("/metrics").text


@pytest.mark.parametrize("given", ["some text", [1], {"a": 1}, None])
def test_a_call_is_taken_back_whatever_the_model_wrote(given: Any) -> None:
    item = {"type": "function_call", "call_id": None, "name": None, "arguments": given}
    chat = chat_of(input=[user("hi"), item, output(text={"a": 1}), output(text=[1])])
    (made,) = chat.messages[1].tool_calls
    assert (made.function.name, made.function.arguments) == ("", given)
    assert [turn.content for turn in chat.messages[2:]] == ['{"a": 1}', "[1]"]
