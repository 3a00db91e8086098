"""Texts that a model goes on with: what is said of them agrees with OpenAI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mlx_specstream import load
from tests.apps.parrot import save_parrot
from tests.apps.serve.conftest import MakeService, ask, client_of
from tests.support import tiny

ANSWER = " is blue, and so."
PROMPTS = ["The sky<assistant>", [*b"The sky", tiny.ASSISTANT]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_parrot(tmp_path_factory.mktemp("models") / "blank", ANSWER)


@pytest.fixture
def client(folder: Path, make_service: MakeService) -> TestClient:
    return client_of(make_service(lambda: load(str(folder)), max_tokens=50))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_tokens_and_offsets_agree(client: TestClient, prompt: object, stream: bool) -> None:
    body = {"prompt": prompt, "logprobs": 1, "stream": stream}
    response = client.post("/v1/completions", json=body)
    if stream:
        lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    else:
        choices = response.json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert text == "".join(tokens) == ANSWER
    whole = "The sky<assistant>" + text
    assert [
        whole[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)
    ] == tokens
    assert choices[-1]["finish_reason"] == "stop"


def test_several_prompts_have_their_own_offsets(client: TestClient) -> None:
    body = {"prompt": ["a<assistant>", "abc<assistant>"], "n": 2, "logprobs": 0}
    choices = client.post("/v1/completions", json=body).json()["choices"]
    first = [choice["logprobs"]["text_offset"][0] for choice in choices]
    assert first == [12, 12, 14, 14]


def test_a_chats_answer_begins_without_a_blank(client: TestClient) -> None:
    (choice,) = client.post("/v1/chat/completions", json=ask(logprobs=True)).json()["choices"]
    assert choice["message"]["content"] == ANSWER[1:]
    assert "".join(one["token"] for one in choice["logprobs"]["content"]) == f"{ANSWER}<eos>"
