"""Lines end where JSON lines end, in every reader; turns of tool calls are turns."""

from __future__ import annotations

import copy
import json

import pytest
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper

from mlx_specstream.errors import DataError
from mlx_specstream.prompts import encode_prompt, prompt_of, read_prompts
from mlx_specstream.prompts.lines import json_lines
from mlx_specstream.train.data import read_records
from tests.support.tiny import hf_byte_tokenizer

BREAKS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"
"""All that `str.splitlines` cuts at and JSON may hold as it is, `\\x0b` to `\\x1e` as escapes."""

CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "b"},
]


def file_of(path, *records, end="\n", start=b""):
    text = end.join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_bytes(start + text.encode() + (end + " " + end).encode())
    return path


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"])
def test_every_reader_sees_whole_records(tmp_path, end, start) -> None:
    records = [{"prompt": BREAKS, "completion": BREAKS}, {"prompt": "x", "completion": BREAKS}]
    path = file_of(tmp_path / "a.jsonl", *records, end=end, start=start)
    assert [record for record, _ in json_lines(path)] == records
    assert [record.fields for record in read_records(path, "train")] == records
    assert [prompt.messages[0]["content"] for prompt in read_prompts(path)] == [BREAKS, "x"]
    last = 3 if end == "\n\n" else 2
    assert [where for _, where in json_lines(path)][1] == f"{path}, line {last}"
    joined = file_of(tmp_path / "b.jsonl", *records, end=end + "\ufeff")
    assert [record for record, _ in json_lines(joined)] == records


def test_prompts_in_plain_text_end_at_line_feeds_alone(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\u2028more\r\n\r\ntwo".encode())
    assert [prompt.title for prompt in read_prompts(path)] == ["one more", "two"]
    assert read_prompts(path)[0].messages[0]["content"] == "one\u2028more"


def test_turns_of_tools_are_turns(tmp_path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    prompt = prompt_of({"messages": CALLED, "tools": tools}, "here")
    assert (prompt.messages, prompt.tools) == (tuple(CALLED[:1]), tuple(tools))
    later = [*CALLED, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    found = prompt_of({"messages": later}, "here")
    assert found.messages == tuple(later[:-1])
    assert found.bare == "a\n\n7\n\nb\n\nc"
    (record,) = read_records(file_of(tmp_path / "a.jsonl", {"messages": later}), "train")
    assert record.fields["messages"] == later
    core = copy.deepcopy(hf_byte_tokenizer())
    core.chat_template = (
        "{% for m in messages %}{{ m.tool_calls[0].function.name if m.tool_calls else m.content }}"
        "{% endfor %}{{ tools | length if tools else 'none' }}"
    )
    tokenizer = TokenizerWrapper(core, BPEStreamingDetokenizer)
    assert encode_prompt(tokenizer, found) == list(b"af7bcnone")
    assert encode_prompt(tokenizer, prompt) == list(b"a1")


@pytest.mark.parametrize("calls", [None, [], "f"])
def test_a_turn_without_words_and_calls_is_none(tmp_path, calls) -> None:
    messages = [*CALLED[:1], {"role": "assistant", "content": None, "tool_calls": calls}]
    with pytest.raises(DataError, match="holds no prompt"):
        prompt_of({"messages": messages}, "here")
    with pytest.raises(DataError, match="content as a string, or tool_calls"):
        read_records(file_of(tmp_path / "a.jsonl", {"messages": messages}), "train")
