"""A model that thinks, through the Responses and the Messages API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mlx_specstream import load
from tests.apps.parrot import save_parrot
from tests.apps.serve.conftest import CALL, TOOL, MakeService, client_of
from tests.apps.serve.test_responses import RESPONSES, named_events
from tests.support import tiny

MESSAGES = "/v1/messages"
THOUGHT = "I had better add."
ANSWER = f"<think>\n{THOUGHT}\n</think>\n\nSo:\n{CALL}"
# Shows the model earlier thoughts, so that a prompt's length tells whether they arrived.
REMEMBERING = tiny.CHAT_TEMPLATE.replace(
    "message['content']",
    "('[' + message.reasoning_content + ']' if message.reasoning_content else '')"
    " + message['content']",
)
HELLO = {"role": "user", "content": "hello"}
ADD = {"type": "function", **TOOL["function"]}
CLIENT_TOOL = {"name": "add", "input_schema": {"type": "object"}}


@pytest.fixture(scope="session")
def thinker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "thinker"
    return save_parrot(folder, ANSWER, marks=("<think>", "</think>"), template=REMEMBERING)


@pytest.fixture
def thinker(thinker_folder: Path, make_service: MakeService) -> TestClient:
    config = {"tool_parser_type": "json_tools"}
    return client_of(
        make_service(lambda: load(str(thinker_folder), tokenizer_config=config), max_tokens=200)
    )


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    """Return the types in order, without repetitions."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    return [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]


@pytest.mark.parametrize("summary", [None, "auto"])
def test_items_of_a_thought_a_text_and_a_call(thinker: TestClient, summary: str | None) -> None:
    body: dict[str, Any] = {"input": [HELLO], "tools": [ADD], "reasoning": {"summary": summary}}
    events = named_events(thinker.post(RESPONSES, json={**body, "stream": True}))
    part, text = "content_part", "reasoning_text"
    if summary:
        part, text = "reasoning_summary_part", "reasoning_summary_text"
    assert kinds_of(events) == [
        *("created", "in_progress"),
        *("output_item.added", f"{part}.added", f"{text}.delta"),
        *(f"{text}.done", f"{part}.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    whole = thinker.post(RESPONSES, json=body).json()
    thought, message, call = whole["output"]
    (said,) = thought["summary" if summary else "content"]
    assert said["text"] == THOUGHT
    assert message["content"][0]["text"] == "So:\n"
    assert 0 < whole["usage"]["output_tokens_details"]["reasoning_tokens"] < 30
    # Sent back, by item or by id, the thought reaches the template.
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "3"}
    sent = thinker.post(RESPONSES, json={**body, "input": [HELLO, *whole["output"], result]}).json()
    by_id = {**body, "input": [result], "previous_response_id": whole["id"]}
    without = thinker.post(
        RESPONSES, json={**body, "input": [HELLO, message, call, result]}
    ).json()["usage"]["input_tokens"]
    assert sent["usage"]["input_tokens"] == without + len(f"[{THOUGHT}]")
    continued = thinker.post(RESPONSES, json=by_id).json()
    assert continued["usage"]["input_tokens"] == sent["usage"]["input_tokens"]


def test_blocks_of_a_thought_a_text_and_a_call(thinker: TestClient) -> None:
    body: dict[str, Any] = {"max_tokens": 200, "messages": [HELLO], "tools": [CLIENT_TOOL]}
    events = named_events(thinker.post(MESSAGES, json={**body, "stream": True}))
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds_of(events) == ["message_start", *block * 3, "message_delta", "message_stop"]
    whole = thinker.post(MESSAGES, json=body).json()
    thought, text, use = whole["content"]
    assert thought == {"type": "thinking", "thinking": THOUGHT, "signature": ""}
    thinking = whole["usage"]["output_tokens_details"]["thinking_tokens"]
    assert 0 < thinking < whole["usage"]["output_tokens"]
    assert text["text"] == "So:\n"
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "3"}
    answer = {"role": "user", "content": [result]}

    def counted(*blocks: dict[str, Any]) -> int:
        turns = [HELLO, {"role": "assistant", "content": list(blocks)}, answer]
        response = thinker.post(f"{MESSAGES}/count_tokens", json={**body, "messages": turns})
        return int(response.json()["input_tokens"])

    assert counted(thought, text, use) == counted(text, use) + len(f"[{THOUGHT}]")


def test_stop_sequences_are_found_behind_the_thought(thinker: TestClient) -> None:
    body = {"max_tokens": 200, "messages": [HELLO], "stop_sequences": ["o", "add."]}
    made = thinker.post(MESSAGES, json=body).json()
    assert (made["stop_reason"], made["stop_sequence"]) == ("stop_sequence", "o")
    assert [block.get("thinking", block.get("text")) for block in made["content"]] == [THOUGHT, "S"]


def test_an_answer_cut_within_its_thought_holds_nothing_else(thinker: TestClient) -> None:
    made = thinker.post(RESPONSES, json={"input": "hello", "max_output_tokens": 4}).json()
    (thought,) = made["output"]
    assert (thought["type"], thought["status"]) == ("reasoning", "incomplete")
    message = thinker.post(MESSAGES, json={"max_tokens": 4, "messages": [HELLO]}).json()
    assert [block["type"] for block in message["content"]] == ["thinking"]
