"""Values that other servers' clients send: taken, honoured, or refused with what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from mlx_specstream.apps.serve.schema import parsed_chat
from mlx_specstream.apps.serve.settings import Settings
from tests.apps.serve.conftest import MakeService, ask, client_of
from tests.support.tiny import byte_tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def answer(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json=ask(**fields))
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert isinstance(choice, dict)
    return choice


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1, "repetition_context_size": 0},
        {"presence_context_size": 0, "frequency_context_size": 0},
        {"top_logprobs": -1},
        {"top_logprobs": 0},
        {"logprobs": False, "top_logprobs": 3},
        {"stop": ""},
        {"stop": ["", ""]},
        {"stop": ["\x07"] * 200},
        {"top_k": -1},
        {"top_k": 0.0},
        {"max_tokens": 16.0},
        {"n": 1.0},
        {"model": ""},
        {"chat_template_kwargs": {"x": [1, {"y": None}]}},
        {"function_call": "none", "functions": []},
        {"function_call": {}},
        {"web_search_options": {}, "modalities": [], "audio": None, "suffix": "", "echo": False},
        {"typical_p": 1, "mirostat": 0, "best_of": 1, "length_penalty": 1.0, "adapters": None},
        {"stop_token_ids": [], "min_tokens": 0, "ignore_eos": False},
        {"add_generation_prompt": True, "continue_final_message": False},
        {"reasoning_effort": "low"},
        {"temperature": 0.0, "seed": 2**64 - 1},
    ],
)
def test_what_means_off_changes_nothing(client: TestClient, fields: dict[str, Any]) -> None:
    assert answer(client, **fields) == answer(client)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 30},
        {"temperature": 1.0, "seed": 2**63 + 7},
        {"presence_penalty": 5.0},
        {"frequency_penalty": -50},
        {"repetition_penalty": 11},
    ],
)
def test_values_beyond_openais_ranges_are_taken(client: TestClient, fields: dict[str, Any]) -> None:
    assert answer(client, **fields)["message"] != answer(client)["message"]


def test_seeds_of_64_bits_are_different_seeds(client: TestClient) -> None:
    texts = {
        answer(client, temperature=1.0, seed=seed)["message"]["content"]
        for seed in (7, 2**63 + 7, 7 - 2**63 + 1)
    }
    assert len(texts) == 3


def test_minus_one_is_as_much_as_the_server_allows(make_service: MakeService) -> None:
    client = client_of(make_service(max_tokens_limit=40))
    for name in ("max_tokens", "max_completion_tokens"):
        reply = client.post(CHAT, json=ask(**{name: -1})).json()
        assert reply["usage"]["completion_tokens"] == 40


def test_alternatives_alone_ask_for_logprobs(client: TestClient) -> None:
    wanted = answer(client, logprobs=True, top_logprobs=2)
    assert answer(client, top_logprobs=2) == wanted
    body = {"prompt": "abc", "max_tokens": 3}
    number, truth, alone = (
        client.post(COMPLETIONS, json={**body, **fields}).json()["choices"]
        for fields in (
            {"logprobs": 2},
            {"logprobs": True, "top_logprobs": 2},
            {"top_logprobs": 2},
        )
    )
    assert number == truth == alone
    assert number[0]["logprobs"]["tokens"]
    (plain,) = client.post(COMPLETIONS, json={**body, "logprobs": False}).json()["choices"]
    assert plain["logprobs"] is None


def test_token_ids_end_an_answer(client: TestClient) -> None:
    pieces = answer(client, draft_details=True)["specstream"]["pieces"]
    texts = [piece["text"] for piece in pieces]
    end = next(place for place, text in enumerate(texts) if place > 3 and text.isascii() and text)
    first = texts.index(texts[end])
    choice = answer(client, stop_token_ids=[ord(texts[end])], draft_details=True)
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "".join(texts[:first])
    # Not before `min_tokens`, whatever the model wants.
    later = answer(client, stop_token_ids=[ord(texts[end])], min_tokens=16, draft_details=True)
    assert later["finish_reason"] == "length"
    assert texts[end] not in later["message"]["content"]
    response = client.post(CHAT, json=ask(stop_token_ids=[999]))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stop_token_ids"


def test_an_answer_goes_on_behind_its_end(make_service: MakeService, talker: Any) -> None:
    client = client_of(make_service(talker, max_tokens=500))
    plain = client.post(CHAT, json=ask()).json()
    length = plain["usage"]["completion_tokens"]
    assert plain["choices"][0]["finish_reason"] == "stop"
    for fields in ({"ignore_eos": True}, {"min_tokens": length + 20}):
        reply = client.post(CHAT, json=ask(max_tokens=length + 20, **fields)).json()
        (choice,) = reply["choices"]
        assert reply["usage"]["completion_tokens"] == length + 20
        assert choice["finish_reason"] == "length"
    # The end itself is the last of those counted.
    same = client.post(CHAT, json=ask(min_tokens=length - 1)).json()
    assert same["choices"] == plain["choices"]


def test_the_least_number_of_tokens_counts_the_answer_alone() -> None:
    import mlx.core as mx

    (process,) = Settings(8, min_tokens=2).processors([1, 2, 3], [5])
    logits = mx.zeros((1, 8))
    held = [process(mx.array([9, *[0] * given]), logits)[0].tolist() for given in range(4)]
    assert [row[5] for row in held] == [-mx.inf, -mx.inf, 0, 0]
    assert all(row[:5] == [0] * 5 for row in held)


def prompt_tokens(client: TestClient, **fields: Any) -> int:
    response = client.post(CHAT, json=ask(**fields))
    assert response.status_code == 200, response.text
    found = response.json()["usage"]["prompt_tokens"]
    assert isinstance(found, int)
    return found


def tokens(text: str) -> int:
    return len(byte_tokenizer().encode(text, add_special_tokens=False))


def test_the_prompt_may_end_with_the_answers_beginning(client: TestClient) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}]
    asked = {"messages": messages}
    whole = "<user>hi<eos><assistant>well"
    assert prompt_tokens(client, **asked) == tokens(whole + "<eos><assistant>")
    assert prompt_tokens(client, **asked, add_generation_prompt=False) == tokens(whole + "<eos>")
    for more in ({}, {"add_generation_prompt": False}):
        fields = {**asked, "continue_final_message": True, **more}
        assert prompt_tokens(client, **fields) == tokens(whole)
        inner = {**asked, "chat_template_kwargs": {**fields}}
        del inner["chat_template_kwargs"]["messages"]
        inner["chat_template_kwargs"]["add_generation_prompt"] = False
        assert prompt_tokens(client, **inner) == tokens(whole)
    both = {**asked, "continue_final_message": True, "add_generation_prompt": True}
    assert client.post(CHAT, json=both).status_code == 400


def test_effort_and_thinking_reach_the_template() -> None:
    def options(**fields: Any) -> dict[str, Any]:
        return parsed_chat(ask(**fields)).template_options

    assert options() == {"add_generation_prompt": True}
    assert options(reasoning_effort="high")["reasoning_effort"] == "high"
    assert options(reasoning_effort="none")["enable_thinking"] is False
    assert options(reasoning_effort="none", enable_thinking=True)["enable_thinking"] is True
    own = options(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "max"})
    assert own["reasoning_effort"] == "max"


def test_older_and_other_histories_are_understood(client: TestClient) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "refusal", "refusal": "no"},
                {"type": "text", "text": "!"},
            ],
        },
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "2"},
    ]
    wanted = "<user>hi<eos><assistant>no!<eos><assistant><eos><tool>2<eos><assistant>"
    assert prompt_tokens(client, messages=messages) == tokens(wanted)
    read = parsed_chat({"messages": messages}).messages
    assert read[2].tool_calls is not None
    assert read[2].tool_calls[0].function.name == "f"


def test_thoughts_that_are_no_text_are_left_out() -> None:
    turn = {"role": "assistant", "content": "x", "reasoning": {"effort": 1}, "reasoning_content": 3}
    (read,) = parsed_chat({"messages": [turn]}).messages
    assert (read.content, read.reasoning, read.reasoning_content) == ("x", None, None)


def test_a_schema_beside_json_object_counts() -> None:
    schema = {"type": "object", "required": ["a"]}
    read = parsed_chat(ask(response_format={"type": "json_object", "schema": schema}))
    wanted = parsed_chat(
        ask(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    )
    assert read.response_format == wanted.response_format


def test_paths_without_v1(client: TestClient) -> None:
    for path, body in ((CHAT, ask()), (COMPLETIONS, {"prompt": "x"})):
        with_v1, without = client.post(path, json=body), client.post(path[3:], json=body)
        assert without.status_code == 200
        assert without.json()["choices"] == with_v1.json()["choices"]
    assert client.get("/models").json() == client.get("/v1/models").json()
    assert 'endpoint="chat",status="200"} 2.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": -1}, "temperature must be a number from 0 to 1000, got -1."),
        ({"temperature": "1"}, 'temperature must be a number from 0 to 1000, got "1".'),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1 or -1, got 0."),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number of at least 1 or -1, got 1.5."),
        (
            {"max_tokens": 2**60},
            "max_tokens must be a whole number from 1 to 9007199254740992 or -1, got",
        ),
        (
            {"stop_token_ids": [-1]},
            "stop_token_ids.0 must be a whole number of at least 0, got -1.",
        ),
        (
            {"stop_token_ids": [2**40]},
            "stop_token_ids.0 must be a whole number from 0 to 2147483647, got 1099511627776.",
        ),
        ({"stop_token_ids": [256]}, "stop_token_ids: the token id 256 is not below 256."),
        (
            {"messages": [{"role": "user", "content": {"a": 1}}]},
            "messages.0.content must be text or a list of at most 4096 entries, got an object.",
        ),
        ({"stream": 1}, "stream must be true or false, got 1."),
        ({"n": 99}, "n must be a whole number from 1 to 8, got 99."),
        ({"top_k": -2}, "top_k must be a whole number of at least -1, got -2."),
        ({"stop": 3}, "stop must be text of at most 1000 characters or a list of at most 256 "),
        ({"stop": ["x", 3]}, "stop.1 must be text of at most 1000 characters, got 3."),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is no token id, written as text."),
        ({"logit_bias": {"1": 101}}, "logit_bias.1 must be a number from -100 to 100, got 101."),
        ({"repetition_penalty": -1}, "repetition_penalty must be a number from 0.01 to 100 or 0,"),
        ({"messages": []}, "messages must be a list of 1 to 4096 entries, got an empty list."),
        (
            {"messages": [{"role": "nobody", "content": ""}]},
            "messages.0.role must be 'system', 'developer', 'user', 'assistant' or 'tool', got "
            '"nobody".',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
            "messages.0.content.0.type must be 'text', 'refusal' or 'thinking', got \"hologram\".",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages.0.content must be text or a list of at most 4096 entries, got 3.",
        ),
        ({"messages": [{"content": "x"}]}, "messages.0.role is missing; it must be 'system', "),
        ({"tools": [{"type": "function"}]}, "tools.0.function is missing; it must be an object."),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type must be 'text', 'json_object' or 'json_schema', got \"xml\".",
        ),
        ({"tool_choice": "any"}, "tool_choice must be 'none', 'auto', 'required' or an object,"),
        ({"functions": [{"name": "f"}]}, "functions is not supported by this server; use tools."),
        ({"guided_json": {"type": "object"}}, "guided_json is not supported by this server; use "),
        ({"best_of": 2}, "best_of is not supported by this server; use n."),
        ({"skip_special_tokens": 0.5}, "skip_special_tokens is not supported"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
    ],
)
def test_a_refusal_names_what_is_allowed(
    client: TestClient, fields: dict[str, Any], said: str
) -> None:
    response = client.post(CHAT, json=ask(**fields))
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert said in message
    for word in ("Input should", "list[", "literal", "TextPart", "constrained", "union"):
        assert word not in message


ANY_PROMPT = (
    "prompt must be text, a list of 1 to 8 texts, a list of 1 or more whole numbers or a list of 1 "
    "to 8 lists, got "
)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (3, f"{ANY_PROMPT}3."),
        ({"a": 1}, f"{ANY_PROMPT}an object."),
        ([], "prompt must be a list of 1 to 8 texts, a list of 1 or more whole numbers or a list "),
        (["a"] * 9, "prompt must be a list of 1 to 8 texts, a list of 1 or more whole numbers or "),
        ([1, "a"], 'prompt.1 must be a whole number of at least 0, got "a".'),
        (["a", 1], "prompt.1 must be text, got 1."),
        ([[1], "a"], 'prompt.1 must be a list of 1 or more whole numbers, got "a".'),
        ([[1], []], "prompt.1 must be a list of 1 or more whole numbers, got an empty list."),
        ([-1], "prompt.0 must be a whole number of at least 0, got -1."),
        ([["a"]], 'prompt.0.0 must be a whole number of at least 0, got "a".'),
        ([256], "prompt: the token id 256 is not below 256."),
    ],
)
def test_a_prompt_of_no_kind_is_explained(client: TestClient, prompt: Any, said: str) -> None:
    response = client.post(COMPLETIONS, json={"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(said)


def test_an_endless_number_is_refused_without_pythons_advice(client: TestClient) -> None:
    for number in ("9" * 5001, "-" + "9" * 5001, "9" * 1001):
        body = f'{{"messages": [{{"role": "user", "content": ""}}], "seed": {number}}}'
        response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["message"] == (
            "the request is not valid JSON: an integer has more than 1000 digits."
        )


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_a_chat_part_that_is_no_text_is_refused_as_the_other_apis_refuse_it(
    client: TestClient, kind: str
) -> None:
    content = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {}}]
    answer = client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        f"messages.0.content.1: {kind!r} cannot be read: the model reads text alone; "
        "send text in its place."
    )
