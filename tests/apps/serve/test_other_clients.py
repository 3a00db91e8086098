"""Anthropic's, LangChain's and LiteLLM's own Python packages against a server on a socket."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add as plus
from typing import Any

import pytest

from mlx_specstream.apps.serve.limits import Access
from tests.apps.parrot import ANSWER, save_parrot
from tests.apps.serve.conftest import TOOL, Live, MakeService

KEY = "a-test-key"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
ADD: Any = {"name": "add", "input_schema": TOOL["function"]["parameters"]}  # type: ignore[index]
ARGUMENTS = {"a": 1, "b": "ü"}
GoLive = Callable[..., Live]


@pytest.fixture
def talking(make_service: MakeService, go_live: GoLive, talker: Any) -> str:
    """The address of a server whose model talks."""
    return go_live(make_service(talker, max_tokens=500), Access(KEY)).url


@pytest.fixture
def calling(make_service: MakeService, go_live: GoLive, caller: Any) -> str:
    """The address of a server whose model calls a tool."""
    return go_live(make_service(caller, max_tokens=200), Access(KEY)).url


def add(a: int, b: str) -> str:
    """Add."""
    return f"{a}{b}"


@pytest.fixture
def anthropic_at() -> Any:
    anthropic = pytest.importorskip("anthropic")
    return lambda url, key=KEY: anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)


def test_anthropic(talking: str, anthropic_at: Any) -> None:
    client = anthropic_at(talking)
    common: Any = {"model": "parrot", "max_tokens": 300, "messages": HELLO}
    message = client.messages.create(**common)
    assert message.content[0].text == ANSWER
    assert message.stop_reason == "end_turn"
    with client.messages.stream(**common) as stream:
        assert "".join(stream.text_stream) == ANSWER
        assert stream.get_final_message().usage.output_tokens == message.usage.output_tokens
    stopped = client.messages.create(**common, stop_sequences=["pear"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "pear")


def test_anthropic_with_tools(calling: str, anthropic_at: Any) -> None:
    client = anthropic_at(calling)
    common: Any = {"model": "caller", "max_tokens": 200, "tools": [ADD]}
    with client.messages.stream(messages=HELLO, **common) as stream:
        for _ in stream:
            pass
        message = stream.get_final_message()
    text, use = message.content
    assert (text.text, use.input, message.stop_reason) == ("Let me see.\n", ARGUMENTS, "tool_use")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "3"}
    turns = [
        *HELLO,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    again = client.messages.create(messages=turns, **common)
    counted = client.messages.count_tokens(model="caller", tools=[ADD], messages=turns)
    assert counted.input_tokens == again.usage.input_tokens + again.usage.cache_read_input_tokens


def test_anthropics_tool_runner(calling: str, anthropic_at: Any) -> None:
    """It would have the server keep the conversation, and does without."""
    anthropic = pytest.importorskip("anthropic")
    if not hasattr(anthropic, "beta_tool"):
        pytest.skip("needs a newer anthropic")
    ran = []

    @anthropic.beta_tool(name="add", description="Add.", input_schema=ADD["input_schema"])
    def run(**arguments: Any) -> str:
        ran.append(arguments)
        return "3"

    messages = anthropic_at(calling).beta.messages.tool_runner(
        model="caller", max_tokens=200, tools=[run], messages=HELLO, max_iterations=3
    )
    assert [message.stop_reason for message in messages] == ["tool_use"] * 3
    assert ran[:2] == [ARGUMENTS] * 2


def test_anthropics_errors_are_of_the_right_class(talking: str, anthropic_at: Any) -> None:
    anthropic = pytest.importorskip("anthropic")
    common: Any = {"model": "parrot", "max_tokens": 3}
    create = anthropic_at(talking).messages.create
    with pytest.raises(anthropic.NotFoundError, match="claude"):
        create(**{**common, "model": "claude"}, messages=HELLO)
    with pytest.raises(anthropic.AuthenticationError):
        anthropic_at(talking, "wrong").messages.create(**common, messages=HELLO)
    image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    with pytest.raises(anthropic.BadRequestError, match="reads text alone"):
        create(**common, messages=[{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        create(**common, messages=[{"role": "user", "content": "x" * 5000}])


@pytest.fixture
def langchain(calling: str) -> Any:
    """What makes each of LangChain's models, over the server that calls a tool."""

    def make(kind: str) -> Any:
        if kind == "anthropic":
            package = pytest.importorskip("langchain_anthropic")
            return package.ChatAnthropic(
                model="caller", base_url=calling, api_key=KEY, max_tokens=200
            )
        package = pytest.importorskip("langchain_openai")
        options: Any = {"use_responses_api": kind != "chat"}
        if kind == "by id":
            options |= {"use_previous_response_id": True, "output_version": "responses/v1"}
        return package.ChatOpenAI(
            model="caller", base_url=f"{calling}/v1", api_key=KEY, max_retries=0, **options
        )

    return make


@pytest.mark.parametrize("kind", ["chat", "responses", "by id", "anthropic"])
def test_langchain(langchain: Any, kind: str) -> None:
    model = langchain(kind).bind_tools([add])
    messages = pytest.importorskip("langchain_core.messages")
    turns = [messages.HumanMessage("hello")]
    answer = model.invoke(turns)
    assert answer.text == "Let me see.\n"
    (call,) = answer.tool_calls
    assert call["args"] == ARGUMENTS
    turns += [answer, messages.ToolMessage("3", tool_call_id=call["id"])]
    assert model.invoke(turns).tool_calls[0]["args"] == ARGUMENTS
    whole = reduce(plus, model.stream(turns[:1]))
    assert whole.text == answer.text
    assert whole.tool_calls[0]["args"] == ARGUMENTS


def test_langchains_structured_output(
    make_service: MakeService, go_live: GoLive, tmp_path: Any
) -> None:
    pytest.importorskip("llguidance")
    package = pytest.importorskip("langchain_openai")
    from mlx_specstream import load

    folder = save_parrot(tmp_path / "parrot", '{"name": "bob", "age": 417}')
    url = go_live(make_service(lambda: load(str(folder)), max_tokens=100), Access(KEY)).url
    schema = {
        "title": "person",
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
        # Letters that a grammar forces are tokens of its own choice; the parrot knows but its own.
        "x-guidance": {"whitespace_flexible": True},
    }
    for responses in (False, True):
        model = package.ChatOpenAI(
            model="parrot", base_url=f"{url}/v1", api_key=KEY, use_responses_api=responses
        )
        found = model.with_structured_output(schema, method="json_schema").invoke("hello")
        assert found == {"name": "bob", "age": 417}


def test_litellm(calling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    openai: Any = {"model": "openai/caller", "api_base": f"{calling}/v1", "api_key": KEY}
    anthropic = {**openai, "model": "anthropic/caller", "api_base": calling, "max_tokens": 200}
    for options in (openai, anthropic):
        made = litellm.completion(messages=HELLO, tools=[TOOL], **options)
        assert made.choices[0].message.tool_calls[0].function.name == "add"
        chunks = litellm.completion(messages=HELLO, tools=[TOOL], stream=True, **options)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == "Let me see.\n"
    tool = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
    made = litellm.responses(input="hello", tools=[tool], **openai)
    assert [item.type for item in made.output] == ["message", "function_call"]
    events = list(litellm.responses(input="hello", tools=[tool], stream=True, **openai))
    assert events[-1].type == "response.completed"
