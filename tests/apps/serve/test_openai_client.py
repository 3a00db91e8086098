"""OpenAI's own Python package against a server on a socket."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("openai")

import openai

from mlx_specstream.apps.serve.limits import Access
from tests.apps.parrot import ANSWER
from tests.apps.serve.conftest import TOOL, Gate, Live, MakeService

KEY = "a-test-key"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TURN: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "turn",
        "parameters": {
            "type": "object",
            "properties": {"way": {"enum": ["left", "right"]}},
            "required": ["way"],
            "additionalProperties": False,
        },
    },
}
Connect = Callable[..., Any]


@pytest.fixture
def connect(make_service: MakeService, go_live: Callable[..., Live]) -> Iterator[Connect]:
    clients = []

    def start(*loading: Any, key: str = KEY, **limits: Any) -> Any:
        live = go_live(make_service(*loading, **limits), Access(KEY))
        clients.append(openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def test_chat(connect: Connect, talker: Any) -> None:
    client = connect(talker, max_tokens=500)
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    reply = client.chat.completions.create(model=model.id, messages=HELLO)
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    details = reply.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > reply.usage.completion_tokens // 3
    assert details.rejected_prediction_tokens > 0


def test_streaming(connect: Connect, talker: Any) -> None:
    client = connect(talker, max_tokens=500)
    stream = client.chat.completions.create(
        model="parrot", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + len(
        client.chat.completions.create(model="parrot", messages=HELLO, logprobs=True)
        .choices[0]
        .logprobs.content
    )


def test_the_stream_helper_follows_along(connect: Connect, caller: Any) -> None:
    client = connect(caller, max_tokens=200)
    with client.chat.completions.stream(model="caller", messages=HELLO, tools=[TOOL]) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Let me see.\n"
    assert message.tool_calls[0].function.name == "add"


def test_tools(connect: Connect, caller: Any) -> None:
    client = connect(caller, max_tokens=200)
    reply = client.chat.completions.create(
        model="caller", messages=HELLO, tools=[TOOL], tool_choice="auto"
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.arguments == '{"a": 1, "b": "ü"}'
    messages = [
        *HELLO,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    again = client.chat.completions.create(model="caller", messages=messages, tools=[TOOL])
    assert again.choices[0].message.tool_calls


def test_a_forced_call(connect: Connect, caller: Any) -> None:
    pytest.importorskip("llguidance")
    client = connect(caller, max_tokens=200)
    for choice in ("required", {"type": "function", "function": {"name": "turn"}}):
        reply = client.chat.completions.create(
            model="caller",
            messages=HELLO,
            tools=[TURN] if choice == "required" else [TOOL, TURN],
            tool_choice=choice,
            parallel_tool_calls=False,
        )
        message = reply.choices[0].message
        assert message.content is None
        (call,) = message.tool_calls
        assert call.function.name == "turn"
        assert json.loads(call.function.arguments)["way"] in ("left", "right")
    with pytest.raises(openai.BadRequestError, match="no tools"):
        client.chat.completions.create(model="caller", messages=HELLO, tool_choice="required")


def test_logprobs(connect: Connect) -> None:
    client = connect()
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=4, max_tokens=5
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == 5
    assert all(len(token.top_logprobs) == 4 for token in content)
    old = client.completions.create(model="tiny", prompt="abc", logprobs=2, max_tokens=3)
    assert len(old.choices[0].logprobs.token_logprobs) == 3
    both = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]


def test_the_bytes_of_tokens_are_the_text(connect: Connect, talker: Any) -> None:
    """The parrot's tokens fall inside of characters."""
    client = connect(talker, max_tokens=500)
    chunks = client.chat.completions.create(
        model="parrot", messages=HELLO, stream=True, logprobs=True
    )
    told = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert bytes(byte for token in told[:-1] for byte in token.bytes).decode() == ANSWER
    made = client.responses.create(
        model="parrot", input="hello", include=["message.output_text.logprobs"]
    )
    (part,) = made.output[0].content
    assert [token.bytes for token in part.logprobs] == [token.bytes for token in told]


def test_one_of_some_allowed_tools(connect: Connect, tiny_caller: Any) -> None:
    pytest.importorskip("llguidance")
    client = connect(tiny_caller, max_tokens=200)
    tools = [{"type": "function", "function": {"name": "turn"}}]
    reply = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        tools=[TOOL, TURN],
        tool_choice={
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": tools},
        },
        parallel_tool_calls=False,
    )
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "turn"
    made = client.responses.create(
        model="tiny",
        input="hello",
        tools=[RESPONSE_TOOL, {"type": "function", "strict": True, **TURN["function"]}],
        tool_choice={"type": "allowed_tools", "mode": "required", "tools": tools_of("turn")},
        parallel_tool_calls=False,
    )
    assert [item.name for item in made.output] == ["turn"]


def tools_of(*names: str) -> list[dict[str, str]]:
    return [{"type": "function", "name": name} for name in names]


def test_objects_of_pydantics_classes(connect: Connect) -> None:
    """`parse` sends a class as a schema and reads the answer as an object of it."""
    pytest.importorskip("llguidance")
    from typing import Literal

    from pydantic import BaseModel

    class Turn(BaseModel):
        way: Literal["left", "right"]
        again: bool | None

    client = connect(max_tokens=200)
    chat = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Turn)
    assert isinstance(chat.choices[0].message.parsed, Turn)
    assert isinstance(
        client.responses.parse(model="tiny", input="hello", text_format=Turn).output_parsed, Turn
    )


def test_what_clients_send_along_is_taken(connect: Connect) -> None:
    client = connect()
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": "be brief"}, *HELLO],
        max_completion_tokens=3,
        metadata={"a": "b"},
        modalities=["text"],
        prediction={"type": "content", "content": "x"},
        prompt_cache_key="k",
        reasoning_effort="minimal",
        safety_identifier="s",
        service_tier="auto",
        store=True,
        verbosity="low",
    )
    assert reply.usage.completion_tokens == 3
    made = client.responses.create(
        model="tiny",
        input="hello",
        background=False,
        include=["reasoning.encrypted_content"],
        max_output_tokens=3,
        max_tool_calls=3,
        reasoning={"effort": "minimal", "summary": "auto"},
        store=False,
        text={"verbosity": "low"},
        truncation="auto",
    )
    assert made.status == "incomplete"
    old = client.completions.create(model="tiny", prompt="a", n=2, best_of=2, max_tokens=2)
    assert len(old.choices) == 2
    with pytest.raises(openai.BadRequestError, match="use n"):
        client.completions.create(model="tiny", prompt="a", n=1, best_of=2)
    with pytest.raises(openai.BadRequestError, match="not streamed"):
        stored = client.responses.create(model="tiny", input="hello", max_output_tokens=2)
        list(client.responses.retrieve(stored.id, stream=True))


def test_errors_are_of_the_right_class(connect: Connect) -> None:
    client = connect()
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="tiny", messages=HELLO, temperature=-9)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        create(model="tiny", messages=[{"role": "user", "content": "x" * 600}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong-key-here").models.list()


def test_a_full_queue_and_an_error_within_a_stream(connect: Connect, gate: Gate) -> None:
    client = connect(decode_concurrency=1, max_queue=0, time_limit_s=4)
    create = client.chat.completions.create
    gate.allow(3)  # the prompt and the first token
    stream = create(model="tiny", messages=HELLO, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    with pytest.raises(openai.RateLimitError) as full:
        create(model="tiny", messages=HELLO)
    assert full.value.response.headers["retry-after"]
    time.sleep(4.1)
    gate.open()
    finish = [chunk.choices[0].finish_reason for chunk in stream]
    assert finish[-1] == "length"


RESPONSE_TOOL: Any = {"type": "function", **TOOL["function"], "strict": False}  # type: ignore[dict-item]


def test_responses(connect: Connect, talker: Any) -> None:
    client = connect(talker, max_tokens=500)
    made = client.responses.create(model="parrot", input="hello")
    assert made.output_text == ANSWER
    assert (made.status, made.error) == ("completed", None)
    assert client.responses.retrieve(made.id).output_text == ANSWER
    client.responses.delete(made.id)
    with pytest.raises(openai.BadRequestError) as gone:
        client.responses.create(model="parrot", input="x", previous_response_id=made.id)
    assert gone.value.code == "previous_response_not_found"
    cut = client.responses.create(model="parrot", input="hello", max_output_tokens=4)
    assert cut.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(model="parrot", input="hello") as stream:
        text = "".join(one.delta for one in stream if one.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == ANSWER


def test_responses_with_tools(connect: Connect, caller: Any) -> None:
    client = connect(caller, max_tokens=200)
    common: Any = {"model": "caller", "tools": [RESPONSE_TOOL]}
    with client.responses.stream(input="hello", **common) as stream:
        for _ in stream:
            pass
        made = stream.get_final_response()
    message, call = made.output
    assert message.content[0].text == "Let me see.\n"
    assert json.loads(call.arguments) == {"a": 1, "b": "ü"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    by_items = client.responses.create(input=[*HELLO, *made.output, result], **common)
    by_id = client.responses.create(input=[result], previous_response_id=made.id, **common)
    assert by_items.usage.input_tokens == by_id.usage.input_tokens
    assert by_items.output[1].type == "function_call"


def test_responses_and_embeddings_are_refused_in_words(connect: Connect) -> None:
    client = connect()
    image = {"type": "input_image", "image_url": "data:,"}
    with pytest.raises(openai.BadRequestError, match="reads text alone") as refused:
        client.responses.create(model="tiny", input=[{"role": "user", "content": [image]}])
    assert refused.value.param == "input"
    with pytest.raises(openai.NotFoundError, match="llama-server --embeddings"):
        client.embeddings.create(model="tiny", input="x")
