"""Answers that must be calls: what the grammar lets through, and what comes of it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder
from tokenizers import AddedToken

from mlx_specstream.apps.serve.errors import ApiError
from mlx_specstream.apps.serve.forced_calls import forced_calls
from mlx_specstream.apps.serve.schema import ChatRequest, parsed_chat
from mlx_specstream.apps.serve.tool_calls import ToolFormat
from mlx_specstream.errors import SpecStreamError
from mlx_specstream.generation.grammar import Grammar
from tests.apps.serve.conftest import MakeService, ask, client_of
from tests.support import tiny
from tests.support.tokenizers import KINDS

pytest.importorskip("llguidance")

CHAT = "/v1/chat/completions"
JSON = ToolFormat("<tool_call>", "</tool_call>", json_tools.parse_tool_call)
MISTRAL = ToolFormat("[TOOL_CALLS]", "", mistral.parse_tool_call)
CODER = ToolFormat("<tool_call>", "</tool_call>", qwen3_coder.parse_tool_call)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A function with parameters that are all needed, and no others."""
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ADD = tool("add", a={"enum": [1, 2]})
SAY = tool("say_ü", text={"type": "string"})
CALL_ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
CALL_SAY = '<tool_call>{"name": "say_ü", "arguments": {"text": "h \\" i"}}</tool_call>'


def forcing(request: ChatRequest, tokenizer: TokenizerWrapper, form: ToolFormat | None) -> Grammar:
    """Return the grammar of the calls that a request insists on."""
    rules = forced_calls(request, tokenizer, form, len(tokenizer.get_vocab()))
    assert rules is not None
    return Grammar.lark(tokenizer, f"start: answer\n{rules}", len(tokenizer.get_vocab()))


def allows(
    form: ToolFormat | None, text: str, tokenizer: TokenizerWrapper | None = None, **fields: Any
) -> bool:
    """Tell whether an answer may be `text` and end there."""
    tokenizer = tokenizer or tiny.byte_tokenizer()
    request = parsed_chat(ask(**{"tools": [ADD, SAY], "tool_choice": "required", **fields}))
    grammar = forcing(request, tokenizer, form)
    matcher = grammar.matcher()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_a_required_call_is_one_or_several_of_the_tools() -> None:
    assert allows(JSON, CALL_ADD)
    assert allows(JSON, CALL_SAY)
    assert allows(JSON, f"{CALL_ADD}\n{CALL_SAY}\n{CALL_ADD}")
    for text in (
        "",
        f"Sure. {CALL_ADD}",
        f"{CALL_ADD} done",
        CALL_ADD.replace("1", "3"),
        CALL_ADD.replace('"a"', '"b"'),
        CALL_ADD.replace("add", "sub"),
        CALL_ADD.removesuffix("</tool_call>"),
    ):
        assert not allows(JSON, text), text
    assert not allows(JSON, f"{CALL_ADD}\n{CALL_SAY}", parallel_tool_calls=False)


def test_a_named_function_is_called_once() -> None:
    choice = {"type": "function", "function": {"name": "say_ü"}}
    assert allows(JSON, CALL_SAY, tool_choice=choice)
    assert not allows(JSON, CALL_ADD, tool_choice=choice)
    assert not allows(JSON, f"{CALL_SAY}\n{CALL_SAY}", tool_choice=choice)


def test_some_tools_may_be_allowed_alone() -> None:
    def choice(*names: str, mode: str = "required") -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    assert allows(JSON, CALL_SAY, tool_choice=choice("say_ü"))
    assert not allows(JSON, CALL_ADD, tool_choice=choice("say_ü"))
    asked = parsed_chat(ask(tools=[ADD, SAY], tool_choice=choice("add", mode="auto")))
    assert asked.tool_choice == "auto"
    assert [tool.function.name for tool in asked.tools or ()] == ["add"]
    with pytest.raises(ApiError, match="no tools"):
        allows(JSON, "", tool_choice=choice("sub"))
    for wrong in (choice(mode="none"), {"type": "allowed_tools"}):
        with pytest.raises(ApiError, match="allowed_tools needs a list of tools"):
            parsed_chat(ask(tools=[ADD], tool_choice=wrong))


def test_definitions_in_parameters_are_found() -> None:
    described = tool("f", x={"$ref": "#/$defs/X"})
    described["function"]["parameters"]["$defs"] = {"X": {"enum": ["yes"]}}
    text = '<tool_call>{"name": "f", "arguments": {"x": "%s"}}</tool_call>'
    assert allows(JSON, text % "yes", tools=[ADD, described])
    assert not allows(JSON, text % "no", tools=[ADD, described])


def test_parameters_may_be_left_out_but_arguments_are_an_object() -> None:
    bare = {"type": "function", "function": {"name": "f"}}
    text = '<tool_call>{"name": "f", "arguments": %s}</tool_call>'
    assert allows(JSON, text % '{"x": [1]}', tools=[bare])
    assert not allows(JSON, text % "[1]", tools=[bare])


def with_marks(*marks: str, special: bool = True) -> TokenizerWrapper:
    """The byte tokenizer with further added tokens, which no text spells out."""
    fast = copy.deepcopy(tiny.hf_byte_tokenizer())
    tokens = [AddedToken(mark, special=special, normalized=False) for mark in marks]
    fast.add_tokens(tokens, special_tokens=special)
    return TokenizerWrapper(fast)


@pytest.mark.parametrize("special", [True, False])  # Qwen's files say False
def test_added_tokens_mark_calls_and_their_letters_do_not(special: bool) -> None:
    marked = with_marks("<tool_call>", "</tool_call>", special=special)
    assert len(marked.encode("<tool_call>", add_special_tokens=False)) == 1
    assert allows(JSON, CALL_ADD, marked)
    spelled = list(CALL_ADD.encode())
    grammar = forcing(parsed_chat(ask(tools=[ADD], tool_choice="required")), marked, JSON)
    assert grammar.matcher().try_consume_tokens(spelled) == 0


@pytest.mark.parametrize("special", [True, False, None])  # None: the marks are letters
@pytest.mark.parametrize("kind", KINDS)
def test_calls_are_forced_as_every_kind_of_tokenizer_cuts_them(
    kind: str, special: bool | None
) -> None:
    fast = KINDS[kind][0]()
    fast.add_special_tokens({"eos_token": "<eos>"})
    if special is not None:
        marks = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]")
        tokens = [AddedToken(mark, special=special, normalized=False) for mark in marks]
        fast.add_tokens(tokens, special_tokens=special)
    tokenizer = TokenizerWrapper(fast)
    assert allows(JSON, CALL_ADD, tokenizer)
    assert allows(JSON, f"{CALL_SAY}\n{CALL_ADD}", tokenizer)
    assert not allows(JSON, f"Sure. {CALL_ADD}", tokenizer)
    old = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]'
    assert allows(MISTRAL, old, tokenizer)
    assert allows(MISTRAL, old.replace("] [", "]["), tokenizer)


@pytest.mark.parametrize("special", [True, False])
def test_mistrals_calls_old_and_new(special: bool) -> None:
    reason = "mlx-lm 0.31, the last one for Python 3.10, reads the newer ones alone"
    pytest.importorskip("mlx_lm.tool_parsers.kimi_k3", reason=reason)
    old = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]'
    assert allows(MISTRAL, old)
    assert not allows(MISTRAL, old, parallel_tool_calls=False)
    assert len(mistral.parse_tool_call(old.removeprefix("[TOOL_CALLS]"))) == 2
    newer = with_marks("[TOOL_CALLS]", "[ARGS]", special=special)
    new = '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": 2}'
    assert allows(MISTRAL, new, newer, tools=[ADD])
    assert not allows(MISTRAL, new, newer, tools=[ADD], parallel_tool_calls=False)
    assert not allows(MISTRAL, old, newer, tools=[ADD])
    assert len(mistral.parse_tool_call(new.removeprefix("[TOOL_CALLS]"))) == 2
    with pytest.raises(ApiError, match="letters"):
        allows(MISTRAL, new, newer, tools=[tool("a b")])


def test_calls_that_cannot_be_forced_are_refused() -> None:
    for form, said, fields in (
        (None, "knows no format", {}),
        (CODER, "arguments as JSON", {}),
        (JSON, "no tools", {"tools": []}),
        (
            JSON,
            "'g' is not among",
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
        ),
        (JSON, "at once", {"response_format": {"type": "json_object"}}),
    ):
        with pytest.raises(ApiError, match=said) as caught:
            allows(form, "", **fields)
        assert caught.value.param == "tool_choice"
    with pytest.raises(SpecStreamError, match="grammar"):
        allows(JSON, "", tools=[tool("f", x={"type": "string", "pattern": "("})])


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_would_talk_calls(
    make_service: MakeService, tiny_caller: Any, stream: bool
) -> None:
    """A model of noise, which alone would never write a call."""

    client = client_of(make_service(tiny_caller, max_tokens=200))
    choice = {"type": "function", "function": {"name": "add"}}
    body = ask(tools=[ADD, SAY], tool_choice=choice, stream=stream)
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    if stream:
        lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
        chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
        finish = chunks[-1]["finish_reason"]
        assert not any(chunk["delta"].get("content") for chunk in chunks)
    else:
        (made,) = response.json()["choices"]
        calls, finish = made["message"]["tool_calls"], made["finish_reason"]
        assert made["message"]["content"] is None
    (call,) = calls
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) in ({"a": 1}, {"a": 2})
    assert finish == "tool_calls"


def test_forcing_needs_what_reads_calls(make_service: MakeService) -> None:
    """The tiny model's own files name no format of calls."""
    response = client_of(make_service()).post(CHAT, json=ask(tools=[ADD], tool_choice="required"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tool_choice"
