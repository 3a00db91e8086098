"""Calls that a model writes badly, from the answer to the next request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_specstream import load
from tests.apps.parrot import save_parrot
from tests.apps.serve.conftest import TOOL, MakeService, ask, client_of

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "inner",
    [
        r'{"name": "add", "arguments": {"b": "\ud83d"}}',
        r'{"name": "add\udc00", "arguments": {}}',
        '{"name": "add", "arguments": "hello there"}',
        '{"name": "add", "arguments": [1, 2]}',
    ],
)
def test_the_conversation_goes_on(
    tmp_path: Path, make_service: MakeService, inner: str, stream: bool
) -> None:
    written = f"Well: <tool_call>{inner}</tool_call>"
    folder = save_parrot(tmp_path / "caller", written)
    config = {"tool_parser_type": "json_tools"}
    client = client_of(
        make_service(lambda: load(str(folder), tokenizer_config=config), max_tokens=100)
    )
    response = client.post(CHAT, json=ask(tools=[TOOL], stream=stream))
    assert response.status_code == 200, response.text
    if stream:
        lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        content = "".join(choice["delta"].get("content", "") for choice in choices)
        finish = choices[-1]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        content, finish = choice["message"]["content"], choice["finish_reason"]
    assert (content, finish) == (written, "stop")
    # What other servers make of such a call is taken back, too.
    call = {"id": "1", "type": "function", "function": json.loads(inner)}
    replayed = [
        [{"role": "assistant", "content": content}],
        [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "no", "tool_call_id": "1"},
        ],
    ]
    for turns in replayed if "\\ud" not in inner else replayed[:1]:
        messages = [*ask()["messages"], *turns, *ask("go on")["messages"]]
        assert client.post(CHAT, json={"messages": messages}).status_code == 200
