"""Answers as blocks, and the events that the Responses and the Messages API make of them."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_specstream.apps.serve.blocks import Blocks
from mlx_specstream.apps.serve.errors import ApiError
from mlx_specstream.apps.serve.messages.reply import MessageReply
from mlx_specstream.apps.serve.replies import Choice, Delta
from mlx_specstream.apps.serve.request import Alternative, Piece
from mlx_specstream.apps.serve.responses.reply import ResponseReply
from mlx_specstream.apps.serve.responses.request import parsed_response
from mlx_specstream.apps.serve.responses.store import ResponseStore
from mlx_specstream.apps.serve.tool_calls import Call
from mlx_specstream.config import SamplingConfig

ADD = Call("add", '{"a": 1}', "call_1")
PING = Call("ping", "{}", "call_2")


def delta(
    text: str = "", *calls: Call, reasoning: str = "", over: str | None = None, pieces: Any = ()
) -> Delta:
    return Delta(text, list(calls), tuple(pieces), over, reasoning)


@pytest.mark.parametrize(
    ("deltas", "blocks", "steps"),
    [
        ([delta("a"), delta("b", over="stop")], ["text:ab"], "open grow grow close"),
        ([delta(over="stop")], ["text:"], "open close"),
        ([delta(" \n", over="length")], ["text: \n"], "open grow close"),
        ([delta(" "), delta("a"), delta(" ", over="stop")], ["text: a "], "open grow grow close"),
        (
            [delta("", ADD), delta("\n"), delta("", PING, over="tool_calls")],
            ['call:{"a": 1}', "call:{}"],
            "open grow close open grow close",
        ),
        (
            [delta("a\n", ADD), delta("b", over="tool_calls")],
            ["text:a\n", 'call:{"a": 1}', "text:b"],
            "open grow close open grow close open grow close",
        ),
        ([delta("\n", ADD), delta("b")], ['call:{"a": 1}', "text:b"], "open grow close open grow"),
        (
            [delta(reasoning="hm"), delta("\n", reasoning="."), delta("\nso", over="stop")],
            ["reasoning:hm.", "text:\n\nso"],
            "open grow grow close open grow close",
        ),
        ([delta(reasoning="hm", over="length")], ["reasoning:hm"], "open grow close"),
        ([delta("a"), delta(over="stop")], ["text:a"], "open grow close"),
    ],
)
def test_blocks_open_grow_and_close_in_turn(
    deltas: list[Delta], blocks: list[str], steps: str
) -> None:
    growing = Blocks()
    taken = [step for one in deltas for step in growing.add(one)]
    assert " ".join(step.kind for step in taken) == steps
    assert [f"{block.kind}:{block.text}" for block in growing.made] == blocks
    assert [block.index for block in growing.made] == list(range(len(blocks)))
    for block in growing.made:
        grown = "".join(step.text for step in taken if step.block is block)
        assert grown == block.text


def test_tokens_stand_with_the_text_that_they_complete() -> None:
    pieces = [
        Piece(n, text, 0, Alternative(n, text.encode(), -1.0)) for n, text in enumerate("abcd")
    ]
    growing = Blocks()
    passes = [delta(pieces=pieces[:1]), delta("ab", pieces=pieces[1:2])]
    # Tokens of a call, whose text is held back until it is complete, are not the text's.
    passes += [delta(pieces=pieces[2:3]), delta("", ADD, pieces=pieces[3:]), delta(over="stop")]
    steps = [step for one in passes for step in growing.add(one)]
    assert [len(step.pieces) for step in steps if step.kind == "grow"] == [2, 0]
    assert [piece.token for piece in growing.made[0].pieces] == [0, 1]


def response(**fields: Any) -> ResponseReply:
    store = ResponseStore()
    asked = parsed_response({"input": "hello", **fields}, store)
    choices = [Choice(0, 3)]
    reply = ResponseReply(
        model="m", choices=choices, asked=asked, store=store, defaults=SamplingConfig(), id="x"
    )
    assert [event["type"] for event in reply.first_chunks()] == [
        "response.created",
        "response.in_progress",
    ]
    return reply


THINKING = [delta(reasoning="hm"), delta("so"), delta("", ADD, over="tool_calls")]


def short(event: dict[str, Any]) -> str:
    """Return what an event is, where, and what it adds."""
    kind = event["type"].removeprefix("response.")
    return f"{event['output_index']} {kind} {event.get('delta', '')}".rstrip()


@pytest.mark.parametrize(
    ("summary", "part", "text", "index"),
    [
        (None, "content_part", "reasoning_text", "content_index"),
        ("auto", "reasoning_summary_part", "reasoning_summary_text", "summary_index"),
    ],
)
def test_a_thought_is_an_item_of_its_own(
    summary: str | None, part: str, text: str, index: str
) -> None:
    reply = response(reasoning={"summary": summary})
    events = [event for one in THINKING for event in reply.chunks(reply.choices[0], one)]
    assert [short(event) for event in events] == [
        "0 output_item.added",
        f"0 {part}.added",
        f"0 {text}.delta hm",
        f"0 {text}.done",
        f"0 {part}.done",
        "0 output_item.done",
        "1 output_item.added",
        "1 content_part.added",
        "1 output_text.delta so",
        "1 output_text.done",
        "1 content_part.done",
        "1 output_item.done",
        "2 output_item.added",
        '2 function_call_arguments.delta {"a": 1}',
        "2 function_call_arguments.done",
        "2 output_item.done",
    ]
    assert [event["sequence_number"] for event in events] == list(range(2, 2 + len(events)))
    assert all(event[index] == 0 for event in events[1:5])
    assert events[0]["item"] == {
        "id": "rs_x_0",
        "status": "in_progress",
        "type": "reasoning",
        "summary": [],
        "content": [],
        "encrypted_content": None,
    }
    thought = events[5]["item"]
    field, other = ("summary", "content") if summary else ("content", "summary")
    assert thought[other] == []
    assert thought[field] == [
        {"type": "summary_text" if summary else "reasoning_text", "text": "hm"}
    ]
    (last,) = reply.last_chunks()
    output = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert last["response"]["output"] == output
    # What was sent is understood when it is sent back.
    again = parsed_response({"input": output}, ResponseStore()).chat.messages
    (turn,) = again
    assert (turn.role, turn.content) == ("assistant", "so")
    assert turn.tool_calls is not None
    assert turn.tool_calls[0].id == "call_1"


def test_an_error_ends_a_response_as_failed() -> None:
    reply = response()
    reply.chunks(reply.choices[0], delta("so"))
    error, failed = reply.failure(ApiError(503, "the server is closing."))
    assert error == {
        "type": "error",
        "sequence_number": 5,
        "code": "server_error",
        "message": "the server is closing.",
        "param": None,
    }
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {
        "code": "server_error",
        "message": "the server is closing.",
    }
    with pytest.raises(ApiError):
        reply.store.get("resp_x")


def test_a_thought_is_a_block_of_a_message() -> None:
    reply = MessageReply(model="m", choices=[Choice(0, 3)], id="x")
    events = [event for one in THINKING for event in reply.chunks(reply.choices[0], one)]
    assert events == [
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        },
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "thinking_delta", "thinking": "hm"},
        },
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "so"}},
        {"type": "content_block_stop", "index": 1},
        {
            "type": "content_block_start",
            "index": 2,
            "content_block": {"type": "tool_use", "id": "call_1", "name": "add", "input": {}},
        },
        {
            "type": "content_block_delta",
            "index": 2,
            "delta": {"type": "input_json_delta", "partial_json": '{"a": 1}'},
        },
        {"type": "content_block_stop", "index": 2},
    ]
    reply.choices[0].finish_reason = "tool_calls"
    message = reply.whole()
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "so"},
        {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}},
    ]
    assert message["stop_reason"] == "tool_use"


def test_an_error_ends_a_message() -> None:
    reply = MessageReply(model="m", choices=[Choice(0, 3)])
    (error,) = reply.failure(ApiError(503, "the server is closing."))
    assert error == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "the server is closing."},
    }
