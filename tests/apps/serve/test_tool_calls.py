"""Calls in a text that arrives in pieces."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tool_parsers import json_tools, mistral

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


def read(form: ToolFormat, parts: list[str]) -> tuple[str, list[Any]]:
    reader = CallReader(form, [])
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


def test_what_cannot_be_parsed_stays_text() -> None:
    for bad in BAD:
        assert read(JSON, [f"a{bad}b"]) == (f"a{bad}b", [])
    assert read(JSON, ["a<tool_call>{"]) == ("a<tool_call>{", [])


def test_a_call_without_an_end_goes_to_the_answers_end() -> None:
    form = ToolFormat(mistral.tool_call_start, mistral.tool_call_end, mistral.parse_tool_call)
    text, (call,) = read(form, ["sure[TOOL_", 'CALLS]add[ARGS]{"a"', ": 1}"])
    assert text == "sure"
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1})
