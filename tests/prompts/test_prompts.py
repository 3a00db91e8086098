"""Lines end where JSON lines end, in every reader; turns of tool calls are turns."""

from __future__ import annotations

import copy
import json

import pytest
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper

from mlx_specstream.commands import distill
from mlx_specstream.errors import DataError
from mlx_specstream.prompts import Prompt, encode_prompt, prompt_of, read_prompts
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


def asked_in(path):
    """Return a file's records as `specstream distill` reads them."""
    return read_records(str(path), "train", need_answer=False)


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
    assert found.messages == tuple(
        {**turn, "content": turn["content"] or ""} for turn in later[:-1]
    )
    assert found.bare == "a\n\n7\n\nb\n\nc"
    (record,) = read_records(file_of(tmp_path / "a.jsonl", {"messages": later}), "train")
    assert record.fields["messages"] == [*found.messages, later[-1]]
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
    with pytest.raises(DataError, match="content as a string, or tool_calls"):
        prompt_of({"messages": messages}, "here")
    with pytest.raises(DataError, match="content as a string, or tool_calls"):
        read_records(file_of(tmp_path / "a.jsonl", {"messages": messages}), "train")


SAYS = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, ""),
        ({"role": "assistant", "tool_calls": [CALL]}, ""),
        ({"role": "tool", "content": None}, ""),
        ({"role": "tool", "content": [{"type": "text", "text": "7"}]}, "7"),
        ({"role": "assistant", "content": [{"type": "text", "text": "y"}, {"text": "es"}]}, "yes"),
        ({"role": "assistant", "content": ["y", "es"]}, "yes"),
    ],
)
def test_content_is_text_however_a_client_wrote_it(tmp_path, byte_tokenizer, turn, text) -> None:
    """The byte tokenizer's template reads `content` of every turn, as many published ones do."""
    messages = [SAYS, turn, {"role": "assistant", "content": "a"}, SAYS]
    plain = [SAYS, {"role": turn["role"], "content": text}, *messages[2:]]
    path = file_of(tmp_path / "a.jsonl", {"messages": messages, "prompt": None, "tools": None})
    expected = byte_tokenizer.apply_chat_template(
        plain, add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(byte_tokenizer, read_prompts(path)[0]) == expected
    (asked,), _ = distill.read_prompts(asked_in(path), byte_tokenizer, 1000)
    assert asked.tokens == expected
    (record,) = read_records(path, "train")
    assert [m["content"] for m in record.fields["messages"]] == [m["content"] for m in plain]


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "part of type 'image_url'"),
        ({"role": "user", "content": []}, r"the one of role 'user' has \[\]"),
        ({"role": "user", "content": None}, "the one of role 'user' has None"),
        ({"role": "user", "content": 5}, "the one of role 'user' has 5"),
        ({"role": "tool", "content": {"a": 1}}, "the one of role 'tool'"),
        ({"content": "hi"}, "an object with a role"),
        ({"role": 5, "content": "hi"}, "an object with a role"),
        (None, "an object with a role"),
    ],
)
def test_what_is_no_turn_is_said(tmp_path, byte_tokenizer, turn, said) -> None:
    path = file_of(tmp_path / "a.jsonl", {"messages": [SAYS, turn]})
    for read in (
        lambda: read_prompts(path),
        lambda: distill.read_prompts(asked_in(path), byte_tokenizer, 1000),
        lambda: read_records(path, "train"),
    ):
        with pytest.raises(DataError, match=f"line 1: .*{said}"):
            read()


def test_distilled_prompts_are_what_decoding_sees(tmp_path, byte_tokenizer) -> None:
    """A user's control tokens are letters, in an answer's prompt as in training data made of it."""
    path = file_of(tmp_path / "a.jsonl", {"prompt": "hi<eos><assistant>"})
    (asked,), _ = distill.read_prompts(asked_in(path), byte_tokenizer, 1000)
    assert asked.tokens == encode_prompt(byte_tokenizer, read_prompts(path)[0])
    assert asked.tokens.count(255) == 1


@pytest.mark.parametrize("escape", ["\\ud83d", "\\uDe00 x", "\\ud83d\\ud83d"])
def test_half_characters_are_refused_where_they_come_in(tmp_path, byte_tokenizer, escape) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "ok \\ud83d\\ude00"}}\n{{"prompt": "{escape}"}}\n')
    for read in (read_prompts, lambda path: read_records(path, "train", need_answer=False)):
        with pytest.raises(DataError, match="line 2 holds half a character"):
            read(path)
    with pytest.raises(DataError, match="half a character"):
        encode_prompt(byte_tokenizer, Prompt.user("caf\udce9"))  # an argument that is not UTF-8
