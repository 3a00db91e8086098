"""Calls in a text that arrives in pieces."""

from __future__ import annotations

import importlib
import json
import pkgutil
from itertools import pairwise
from typing import Any

import mlx_lm.tool_parsers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tool_parsers import json_tools, mistral

from mlx_specstream.apps.serve.limits import MAX_TOOLS
from mlx_specstream.apps.serve.schema import parsed_chat
from mlx_specstream.apps.serve.tool_calls import CallReader, ToolFormat

JSON = ToolFormat("<tool_call>", "</tool_call>", json_tools.parse_tool_call)
GOOD = '<tool_call>{"name": "f", "arguments": {"x": [1, "ü"]}}</tool_call>'
BAD = (
    "<tool_call>{oops</tool_call>",
    "<tool_call>[1]</tool_call>",
    '<tool_call>{"name": 3}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    "<tool_call>" + "[" * 5000 + "</tool_call>",
)


def read(form: ToolFormat, parts: list[str], tools: Any = ()) -> tuple[str, list[Any]]:
    reader = CallReader(form, tools)
    text, calls = "", []
    for place, part in enumerate(parts):
        plain, found = reader.feed(part, over=place == len(parts) - 1)
        text += plain
        calls += found
    return text, calls


@given(
    st.lists(st.sampled_from([GOOD, *BAD[:4], "a", "<tool", "\n", "<"]), max_size=6),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_cuts_change_nothing(parts: list[str], cuts: list[int]) -> None:
    whole = "".join(parts)
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[a:b] for a, b in pairwise(places)] or [""]
    text, calls = read(JSON, [whole])
    again, same = read(JSON, pieces)
    assert again == text
    assert [(c.name, c.arguments) for c in same] == [(c.name, c.arguments) for c in calls]


def test_calls_and_text_are_told_apart() -> None:
    text, calls = read(JSON, [f"one {GOOD} two {GOOD}"])
    assert text == "one  two "
    assert [json.loads(call.arguments) for call in calls] == [{"x": [1, "ü"]}] * 2
    assert calls[0].id != calls[1].id


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (f"\n\n{GOOD}\n{GOOD}\n", ""),
        (f"{GOOD}\n{BAD[0]}\n{GOOD}", f"\n{BAD[0]}\n"),
        (f"a\n{GOOD}\n", "a\n"),
        (f"{GOOD}\nb", "\nb"),
        ("\n \n", "\n \n"),
        (f"\n{BAD[0]}", f"\n{BAD[0]}"),
    ],
)
def test_blanks_between_calls_are_no_text(written: str, text: str) -> None:
    assert read(JSON, [written])[0] == text
    assert read(JSON, list(written))[0] == text


def test_what_cannot_be_parsed_stays_text() -> None:
    for bad in BAD:
        assert read(JSON, [f"a{bad}b"]) == (f"a{bad}b", [])
    assert read(JSON, ["a<tool_call>{"]) == ("a<tool_call>{", [])


def test_a_call_without_an_end_goes_to_the_answers_end() -> None:
    form = ToolFormat(mistral.tool_call_start, mistral.tool_call_end, mistral.parse_tool_call)
    text, (call,) = read(form, ["sure[TOOL_", 'CALLS]add[ARGS]{"a"', ": 1}"])
    assert text == "sure"
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1})


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "object"}},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]

# What a model may write for f(a=1) in each of mlx-lm's formats, and ways to get it wrong.
FORMATS = {
    "json_tools": (
        '{"name": "f", "arguments": {"a": 1}}',
        [
            '{"name": "f", "arguments": "hello"}',
            '{"name": "f", "arguments": [1, 2]}',
            '{"name": "f", "arguments": 7}',
            '{"name": "f", "arguments": true}',
            '{"name": "f", "arguments": {"b": "\\ud83d"}}',
            '{"name": "f", "arguments": {"\\udead": 1}}',
            '{"name": "\\ud83d", "arguments": {}}',
            '{"name": "f", "arguments": {}, "id": "\\udfff"}',
            '{"name": "f", "arguments": {"a": NaN}}',
            '{"name": "f", "arguments": {"a": 1e999}}',
            '{"name": "f", "arguments": {"a": %s}}' % ("9" * 5000),
            '{"name": "f", "arguments": {"c": %s}}' % ("[" * 5000 + "]" * 5000),
            '{"name": "f", "a": 1}',
            '{"name": "", "arguments": {}}',
            '{"name": null, "arguments": {}}',
            '{"name": "f", "arguments": {"a": 1}',
            json.dumps(TOOLS[0]),
            '"f"',
            "null",
            "[]",
            "",
        ],
    ),
    "mistral": (
        'f[ARGS]{"a": 1}',
        [
            "f[ARGS]7",
            'f[ARGS]{"b": "\\ud83d"}',
            'f[ARGS]["a"]',
            "[7]",
            '[{"name": "f", "id": 1}',
            "",
        ],
    ),
    "qwen3_coder": (
        "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>",
        [
            "<function=f><parameter=a>1e999</parameter></function>",
            "<function=f><parameter=a>x</parameter></function>",
            "<function=f><parameter=c>{1, 2}</parameter></function>",
            "<function=f><parameter=a>1</parameter>",
            "<function=>\n</function>",
        ],
    ),
    "pythonic": (
        "[f(a=1)]",
        ["[f(a=1)", "[f(a={1, 2})]", "[f(a=1j)]", "[f(a=b'x')]", "[f(b='\\ud83d')]", "[]", "f"],
    ),
    "glm47": (
        "f<arg_key>a</arg_key><arg_value>1</arg_value>",
        [
            "f<arg_key>c</arg_key><arg_value>{1, 2}</arg_value>",
            "<arg_key>a</arg_key><arg_value>1</arg_value>",
            "f\noops",
            "f oops",
            "",
            "{",
            'f<arg_key>c</arg_key><arg_value>{"x": "\\ud83d"}</arg_value>',
        ],
    ),
    "longcat": (
        "f<longcat_arg_key>a</longcat_arg_key><longcat_arg_value>1</longcat_arg_value>",
        ["f", '{"name": "f", "arguments": 1}', "{}"],
    ),
    "gemma4": ("call:f{a:1}", ["call:f{a:}", "call:f{", 'call:f{b:"\\ud83d"}', "f{}"]),
    "function_gemma": ("call:f{a:1}", ["call:f{a}", "call:f{a:NaN}", "call:f{b:<escape>x}", "f"]),
    "kimi_k2": (
        '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>',
        [
            "functions.f:0<|tool_call_argument_begin|>hello",
            "functions.f:0<|tool_call_argument_begin|>[1]",
            'functions.f:0<|tool_call_argument_begin|>{"b": "\\ud83d"}',
            "functions.f:0<|tool_call_argument_begin|>{1: {2, 3}}",
            "functions.f:0",
        ],
    ),
    "kimi_k3": (
        '<|open|>call tool="f"<|sep|><|open|>argument key="a" type="integer"<|sep|>1'
        "<|close|>argument<|sep|><|close|>call<|sep|>",
        [
            '<|open|>call tool="f"<|sep|><|open|>json type="object"<|sep|>[]'
            "<|close|>json<|sep|><|close|>call<|sep|>",
            '<|open|>call tool=""<|sep|><|close|>call<|sep|>',
        ],
    ),
    "laguna": ("f<arg_key>a</arg_key><arg_value>1</arg_value>", ["f oops"]),
    "minicpm5": (
        '"f"><param name="a">1</param>',
        ['"f"><param name="a">Infinity</param>', '""><param name="a">1</param>', ""],
    ),
    "minimax_m2": (
        '<invoke name="f"><parameter name="a">1</parameter></invoke>',
        [
            '<invoke name="f"><parameter name="c">{1, 2}</parameter></invoke>',
            '<invoke name=""></invoke>',
            "<invoke></invoke>",
        ],
    ),
    "muse_spark": (
        '<atem:invoke name="f"><atem:parameter name="a">1</atem:parameter></atem:invoke>',
        [
            '<atem:invoke name="f"><atem:parameter name="a">NaN</atem:parameter></atem:invoke>',
            '<atem:invoke name="f"><atem:parameter name="b">"\\ud83d"</atem:parameter></atem:invoke>',
            "<atem:invoke>",
        ],
    ),
}


HERE = {module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)}
KNOWN = sorted(HERE & set(FORMATS))  # mlx-lm 0.31, the last one for Python 3.10, has fewer


def form_of(name: str) -> ToolFormat:
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    return ToolFormat(module.tool_call_start, module.tool_call_end, module.parse_tool_call)


def test_every_format_of_mlx_lm_is_in_the_table() -> None:
    assert set(FORMATS) >= HERE


@pytest.mark.parametrize("name", KNOWN)
def test_bad_calls_stay_text_in_every_format(name: str) -> None:
    if name in ("pythonic", "minimax_m2") and "kimi_k3" not in HERE:
        pytest.skip("mlx-lm 0.31 reads some of these otherwise")
    form, (good, bad) = form_of(name), FORMATS[name]
    text, (call,) = read(form, [f"{form.start}{good}{form.end}"], TOOLS)
    assert (text, call.name, json.loads(call.arguments)) == ("", "f", {"a": 1})
    for inner in bad:
        whole = f"a{form.start}{inner}{form.end}"
        assert read(form, [whole], TOOLS) == (whole, []), inner


@given(st.sampled_from(KNOWN), st.data())
def test_what_is_sent_out_is_accepted_back(name: str, data: st.DataObject) -> None:
    """Good and bad calls with a piece cut out or put in."""
    form = form_of(name)
    good, bad = FORMATS[name]
    inner = data.draw(st.sampled_from([good, *bad]))
    start = data.draw(st.integers(0, len(inner)))
    end = data.draw(st.integers(start, min(len(inner), start + 4)))
    put = data.draw(st.sampled_from(["", "{", '"', "\\ud800", "NaN", "[]", "}", "<", "=", "\0"]))
    whole = f"{form.start}{inner[:start]}{put}{inner[end:]}{form.end}"
    text, calls = read(form, [whole], TOOLS)
    assert calls or text == whole
    made = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in calls
    ]
    answer = {"role": "assistant", "content": text, "tool_calls": made}
    json.dumps(answer, ensure_ascii=False).encode()
    parsed_chat({"messages": [answer]})
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)


@pytest.mark.parametrize(
    "inner",
    [
        '{"name": "f", "parameters": {"a": 1}}',
        '{"name": "f", "args": {"a": 1}}',
        '{"name": "f", "input": {"a": 1}}',
        '{"tool": "f", "params": {"a": 1}}',
        '{"function": "f", "arguments": {"a": 1}}',
        '{"tool_name": "f", "arguments": "{\\"a\\": 1}"}',
        '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}',
        '{"name": "f", "arguments": {"a": 1}, "thought": "so"}',
    ],
)
def test_arguments_are_found_under_other_names(inner: str) -> None:
    text, (call,) = read(JSON, [f"<tool_call>{inner}</tool_call>"], TOOLS)
    assert (text, call.name, json.loads(call.arguments)) == ("", "f", {"a": 1})


@pytest.mark.parametrize("arguments", ["", ', "arguments": null', ', "arguments": ""'])
def test_a_call_without_arguments_is_one(arguments: str) -> None:
    _, (call,) = read(JSON, [f'<tool_call>{{"name": "f"{arguments}}}</tool_call>'], TOOLS)
    assert call.arguments == "{}"


def test_calls_of_one_answer_have_different_ids() -> None:
    call = 'functions.f:0<|tool_call_argument_begin|>{"a": 1}'
    inner = f"<|tool_call_begin|>{call}<|tool_call_end|>" * 2
    form = form_of("kimi_k2")
    _, calls = read(form, [f"{form.start}{inner}{form.end}"], TOOLS)
    assert calls[0].id == "functions.f:0" != calls[1].id


def test_no_more_calls_than_a_client_may_send_back() -> None:
    text, calls = read(JSON, [GOOD * (MAX_TOOLS + 1)])
    assert len(calls) == MAX_TOOLS
    assert text == GOOD
