"""The API in this process: what is answered, and how every wrong request is refused."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from mlx_specstream import StreamModel, stream_generate
from tests.apps.parrot import ANSWER
from tests.apps.serve.conftest import CALL, CALLING, TOOL, TREE, MakeService, ask, client_of
from tests.support.tiny import byte_tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def events(response: Any) -> list[dict[str, Any]]:
    """Return the objects of a stream that ended as it should."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = [part for part in response.text.split("\n\n") if part]
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def own_text(model: StreamModel, prompt: str, max_tokens: int = 16) -> str:
    tokenizer = byte_tokenizer()
    ids = list(tokenizer.encode(prompt, add_special_tokens=False))
    stream = stream_generate(model, tokenizer, ids, max_tokens, config=TREE)
    return "".join(response.text for response in stream)


def test_a_chat_is_answered_as_the_library_does(
    client: TestClient, tiny_stream_model: StreamModel
) -> None:
    reply = client.post(CHAT, json=ask(model="tiny")).json()
    (choice,) = reply["choices"]
    wanted = own_text(tiny_stream_model, "<user>hello<eos><assistant>")
    assert choice["message"] == {"role": "assistant", "content": wanted, "refusal": None}
    assert choice["finish_reason"] == "length"
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (8, 16)
    assert usage["total_tokens"] == 24
    drafts = usage["completion_tokens_details"]
    assert drafts["accepted_prediction_tokens"] + drafts["rejected_prediction_tokens"] > 16


def test_a_stream_holds_the_same_text(client: TestClient) -> None:
    whole = client.post(CHAT, json=ask()).json()
    response = client.post(
        CHAT, json=ask(stream=True, stream_options={"include_usage": True}, draft_details=True)
    )
    first, *chunks, last = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 16
    figures = [chunk["choices"][0]["specstream"] for chunk in chunks]
    pieces = [piece for one in figures for piece in one["pieces"]]
    assert "".join(piece["text"] for piece in pieces) == text
    assert figures[-1]["tokens"] == len(pieces) == 16


def test_who_proposed_a_token_is_told(make_service: MakeService, talker: Any) -> None:
    client = client_of(make_service(talker, max_tokens=500))
    reply = client.post(CHAT, json=ask(draft_details=True)).json()
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == ANSWER
    assert choice["finish_reason"] == "stop"
    origins = [piece["origin"] for piece in choice["specstream"]["pieces"]]
    # After the first pass, of which the streams know nothing, stream 1 is always right.
    assert origins[:5] == [0, 1, 0, 1, 0]
    assert choice["specstream"]["tokens_per_pass"] > 1.9
    chunks = events(client.post(CHAT, json=ask(draft_details=True, stream=True)))
    speeds = [chunk["choices"][0]["specstream"]["tokens_per_s"] for chunk in chunks[1:]]
    assert all(0 < speed < 1e6 for speed in speeds)


def test_completions_of_several_prompts(client: TestClient, tiny_stream_model: StreamModel) -> None:
    ids = list(b"second")
    body = {"prompt": ["first", "second"], "max_tokens": 7}
    reply = client.post(COMPLETIONS, json=body).json()
    assert reply["object"] == "text_completion"
    texts = [choice["text"] for choice in reply["choices"]]
    assert texts == [own_text(tiny_stream_model, prompt, 7) for prompt in body["prompt"]]
    assert reply["usage"]["prompt_tokens"] == 11
    again = client.post(COMPLETIONS, json={"prompt": ids, "max_tokens": 7}).json()
    assert again["choices"][0]["text"] == texts[1]


def test_a_seed_fixes_the_answer_and_n_gives_different_ones(client: TestClient) -> None:
    body = ask(temperature=1.0, top_p=0.95, top_k=200, min_p=0.001, seed=7, n=3)
    first = client.post(CHAT, json=body).json()
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) == 3
    assert first["usage"]["prompt_tokens"] == 8
    again = client.post(CHAT, json=body).json()
    assert [choice["message"]["content"] for choice in again["choices"]] == texts
    other = client.post(CHAT, json={**body, "seed": 8}).json()
    assert [choice["message"]["content"] for choice in other["choices"]] != texts
    # The second answer of seed 7 is the first of seed 8: seeds count up.
    assert other["choices"][0]["message"]["content"] == texts[1]


def test_n_answers_read_the_prompt_once(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, prefill = [], StreamModel.prefill

    def counted(self: StreamModel, ids: Any, *rest: Any) -> Any:
        read.append(len(ids))
        return prefill(self, ids, *rest)

    monkeypatch.setattr(StreamModel, "prefill", counted)
    body = ask("long " * 40, n=3, temperature=1.0, stream=True, max_tokens=2)
    assert client.post(CHAT, json=body).status_code == 200
    # Of <user>long long ... <eos><assistant> all but the last token, which decoding starts from.
    assert read == [202, 0, 0]


def test_stop_strings_end_the_answer(make_service: MakeService, talker: Any) -> None:
    client = client_of(make_service(talker, max_tokens=500))
    reply = client.post(CHAT, json=ask(stop=["I like", "never"])).json()
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == ANSWER[: ANSWER.index("I like")]
    assert choice["finish_reason"] == "stop"


def test_logit_bias_and_penalties_change_the_answer(client: TestClient) -> None:
    plain = client.post(CHAT, json=ask()).json()["choices"][0]["message"]["content"]
    banned = ord(plain[0])
    reply = client.post(CHAT, json=ask(logit_bias={str(banned): -100})).json()
    assert plain[0] not in reply["choices"][0]["message"]["content"]
    for penalty in ("presence_penalty", "frequency_penalty"):
        other = client.post(CHAT, json=ask(**{penalty: 2.0})).json()
        assert other["choices"][0]["message"]["content"] != plain
    other = client.post(CHAT, json=ask(repetition_penalty=2.0)).json()
    assert other["choices"][0]["message"]["content"] != plain


def test_xtc_cuts_the_likeliest_tokens(client: TestClient) -> None:
    """Where two tokens reach the threshold, and XTC is certain, the likeliest is not drawn."""
    body = ask(temperature=1.0, seed=1, max_tokens=12)
    plain = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    drawn = {**body, "logprobs": True, "top_logprobs": 1, "xtc_threshold": 0.01}
    cut = client.post(CHAT, json={**drawn, "xtc_probability": 1.0}).json()["choices"][0]
    assert cut["message"]["content"] != plain
    for token in cut["logprobs"]["content"]:
        (likeliest,) = token["top_logprobs"]
        assert likeliest["logprob"] > token["logprob"], "the likeliest is never drawn"
    again = client.post(CHAT, json={**drawn, "xtc_probability": 0.0}).json()["choices"][0]
    assert again["message"]["content"] == plain


def test_penalties_do_not_depend_on_what_the_cache_holds(client: TestClient) -> None:
    body = ask("abcabcabc", repetition_penalty=1.5, repetition_context_size=200)
    first = client.post(CHAT, json=body).json()
    again = client.post(CHAT, json=body).json()
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 11
    assert again["choices"][0]["message"] == first["choices"][0]["message"]


def test_logprobs(client: TestClient) -> None:
    reply = client.post(CHAT, json=ask(logprobs=True, top_logprobs=3, max_tokens=5)).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for token in content:
        tops = token["top_logprobs"]
        assert len(tops) == 3
        assert tops[0]["logprob"] == token["logprob"]  # greedy
        assert tops[0]["logprob"] >= tops[1]["logprob"] >= tops[2]["logprob"]
        assert sum(2.718281828 ** one["logprob"] for one in tops) < 1.0001
    text = reply["choices"][0]["message"]["content"]
    data = bytes(b for token in content for b in token["bytes"])
    assert data.decode(errors="replace") == text


def test_parts_of_characters_have_their_bytes(make_service: MakeService, talker: Any) -> None:
    """The parrot's pieces fall inside of characters."""
    client = client_of(make_service(talker, max_tokens=500))
    (choice,) = client.post(CHAT, json=ask(logprobs=True)).json()["choices"]
    content = choice["logprobs"]["content"][:-1]  # the last one ends the turn
    assert bytes(b for token in content for b in token["bytes"]).decode() == ANSWER
    parts = [one for one in content if "\\x" in one["token"]]
    assert parts
    for one in parts:
        assert bytes(one["bytes"]).decode(errors="backslashreplace") == one["token"]
    body = {"prompt": "<assistant>", "logprobs": 2}
    (choice,) = client.post(COMPLETIONS, json=body).json()["choices"]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert [token.removeprefix("bytes:") for token in tokens] == [one["token"] for one in content]
    assert sum(token.startswith("bytes:") for token in tokens) == len(parts)
    before = len("<assistant>")
    for token, place in zip(tokens, offsets, strict=True):
        if not token.startswith("bytes:"):
            assert ANSWER[place - before :].startswith(token)
    assert all(len(one) == 2 for one in choice["logprobs"]["top_logprobs"])


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_do_not_depend_on_what_a_stop_string_holds_back(
    make_service: MakeService, talker: Any, stream: bool
) -> None:
    client = client_of(make_service(talker, max_tokens=500))
    body = {"prompt": "<assistant>", "logprobs": 0, "stream": stream, "stop": [ANSWER[3:40] + "?"]}
    response = client.post(COMPLETIONS, json=body)
    choices = [c["choices"][0] for c in events(response)] if stream else response.json()["choices"]
    found = [
        pair
        for one in choices
        for pair in zip(one["logprobs"]["tokens"], one["logprobs"]["text_offset"], strict=True)
    ]
    places = [place for _, place in found]
    assert places == sorted(places)
    for token, place in found:
        if not token.startswith("bytes:"):
            assert ANSWER[place - len("<assistant>") :].startswith(token)


def test_tokens_that_end_a_text_are_not_listed(make_service: MakeService, talker: Any) -> None:
    client = client_of(make_service(talker, max_tokens=500))
    body = {"prompt": "<assistant>", "logprobs": 0, "stop_token_ids": [262]}
    (choice,) = client.post(COMPLETIONS, json=body).json()["choices"]
    assert choice["text"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == 6  # pieces 256 to 261


def test_completion_logprobs(client: TestClient) -> None:
    body = {"prompt": "abc", "max_tokens": 4, "logprobs": 2}
    logprobs = client.post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
    assert [len(logprobs[name]) for name in ("tokens", "token_logprobs", "text_offset")] == [4] * 3
    assert logprobs["text_offset"][0] == len("abc")
    chunks = events(client.post(COMPLETIONS, json={**body, "stream": True}))
    streamed = [c["choices"][0]["logprobs"] for c in chunks]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [value for one in streamed for value in one[name]]
        if name == "token_logprobs":
            assert parts == pytest.approx(logprobs[name], abs=1e-4)
        elif name != "top_logprobs":
            assert parts == logprobs[name]


def test_tool_calls(make_service: MakeService, caller: Any) -> None:
    client = client_of(make_service(caller, max_tokens=200))
    reply = client.post(CHAT, json=ask(tools=[TOOL])).json()
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see.\n"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": "ü"}
    chunks = events(client.post(CHAT, json=ask(tools=[TOOL], stream=True)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == "Let me see.\n"
    (streamed,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert streamed["index"] == 0
    assert streamed["function"] == call["function"]
    for body in (ask(), ask(tools=[TOOL], tool_choice="none")):
        plain = client.post(CHAT, json=body).json()["choices"][0]
        assert plain["message"]["content"] == CALLING
        assert plain["finish_reason"] == "stop"
    assert CALL in CALLING


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "seed": 1, "logprobs": True}])
def test_an_answer_fits_its_schema(client: TestClient, more: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    # In a random model digits and blanks go on for ever; a bias towards the brace ends them.
    bias = {"125": 50, "32": -100, "10": -100, "13": -100, "9": -100}
    body = ask(response_format=schema_format(SCHEMA), max_tokens=120, logit_bias=bias, **more)
    (choice,) = client.post(CHAT, json=body).json()["choices"]
    assert choice["finish_reason"] == "stop"
    found = json.loads(choice["message"]["content"])
    assert found["name"] in ("ann", "bob")
    assert isinstance(found["age"], int)


def test_json_mode_begins_an_object(client: TestClient) -> None:
    pytest.importorskip("llguidance")
    plain = client.post(CHAT, json=ask(response_format={"type": "text"})).json()
    assert (
        plain["choices"][0]["message"]
        == client.post(CHAT, json=ask()).json()["choices"][0]["message"]
    )
    reply = client.post(CHAT, json=ask(response_format={"type": "json_object"})).json()
    assert reply["choices"][0]["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"$ref": "#/nowhere"}, {"pattern": "("}, 3]
)
def test_a_schema_that_makes_no_sense_is_refused(client: TestClient, schema: Any) -> None:
    pytest.importorskip("llguidance")
    if isinstance(schema, dict) and "pattern" in schema:
        schema = {"type": "string", **schema}
    response = client.post(CHAT, json=ask(response_format=schema_format(schema)))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"


def test_a_conversation_with_calls_and_parts_is_understood(client: TestClient) -> None:
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "x"}],
        },
        {"role": "user", "content": "add", "name": "me"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 1}'},
                }
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    reply = client.post(CHAT, json={"messages": messages})
    assert reply.status_code == 200
    wanted = "<system>Be x<eos><user>add<eos><assistant><eos><tool>2<eos><assistant>"
    ids = byte_tokenizer().encode(wanted, add_special_tokens=False)
    assert reply.json()["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        (ask(messages=[]), "messages"),
        (ask(messages=[{"role": "user", "content": 3}]), "messages"),
        (ask(messages=[{"role": "nobody", "content": ""}]), "messages"),
        (
            ask(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "messages",
        ),
        (ask(temperature="1"), "temperature"),
        (ask(temperature=1001), "temperature"),
        (ask(temperature=True), "temperature"),
        (ask(top_p=-0.1), "top_p"),
        (ask(max_tokens=0), "max_tokens"),
        (ask(max_tokens=1.5), "max_tokens"),
        (ask(n=0), "n"),
        (ask(n=99), "n"),
        (ask(seed=2**64), "seed"),
        (ask(stop=[3]), "stop"),
        (ask(stop=["x"] * 257), "stop"),
        (ask(stream=1), "stream"),
        (ask(logit_bias={"x": 1}), "logit_bias"),
        (ask(logit_bias={"999": 1}), "logit_bias"),
        (ask(logit_bias={"1": 101}), "logit_bias"),
        (ask(top_logprobs=-2), "top_logprobs"),
        (ask(logprobs=True, top_logprobs=21), "top_logprobs"),
        (ask(tools=[{"type": "function"}]), "tools"),
        (ask(tool_choice="required"), "tool_choice"),
        (ask(response_format={"type": "xml"}), "response_format"),
        (ask(chat_template_kwargs={"chat_template": "{{ 1 }}"}), "chat_template_kwargs"),
        (ask(chat_template_kwargs=[1]), "chat_template_kwargs"),
        (ask(functions=[{"name": "f"}]), None),
        (ask("x" * 600), "messages"),
    ],
)
def test_what_makes_no_sense_is_refused(
    client: TestClient, body: dict[str, Any], param: str | None
) -> None:
    response = client.post(CHAT, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"temperature": 1e999}',
        b'{"x": ' + b"9" * 5000 + b"}",
        b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"x": ' + b"[" * 100_000,
        b'{"x": ' + b'{"a":' * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_what_is_no_json_is_refused(client: TestClient, data: bytes) -> None:
    response = client.post(CHAT, content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_other_statuses(client: TestClient) -> None:
    found = {
        404: client.get("/v2/models"),
        405: client.get(CHAT),
        413: client.post(
            CHAT, content=b" " * (3 * 2**20), headers={"Content-Type": "application/json"}
        ),
        415: client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}),
    }
    for status, response in found.items():
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert found[405].headers["allow"] == "POST"
    form = client.post(CHAT, data={"messages": "x"})
    assert form.status_code == 415


def test_a_body_without_a_length_is_bound_too(make_service: MakeService) -> None:
    client = client_of(make_service(max_body_bytes=4096))
    parts = iter([b'{"x": "', *[b"y" * 1000] * 10, b'"}'])
    response = client.post(CHAT, content=parts, headers={"Content-Type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize("name", ["gpt-4", "../tiny", "/etc/passwd", "tiny/../../x", " "])
def test_only_the_served_model_can_be_named(client: TestClient, name: str) -> None:
    response = client.post(CHAT, json=ask(model=name))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert client.get(f"/v1/models/{quote(name, safe='')}x").status_code == 404


def test_models_health_and_metrics(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert (model["mode"], model["num_streams"]) == ("lossless", 4)
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/health").json() == {"status": "ok"}
    client.post(CHAT, json=ask())
    text = client.get("/metrics").text
    assert 'specstream_requests_total{endpoint="chat",status="200"} 1.0' in text
    assert "specstream_generated_tokens_total 16.0" in text
    assert "specstream_active_answers 0.0" in text


def test_max_tokens_are_bound_by_limit_and_context(make_service: MakeService) -> None:
    client = client_of(make_service(max_tokens_limit=20))
    reply = client.post(CHAT, json=ask(max_completion_tokens=400)).json()
    assert reply["usage"]["completion_tokens"] == 20
    client = client_of(make_service())
    body = {"prompt": "x" * 500, "max_tokens": 400}
    reply = client.post(COMPLETIONS, json=body).json()
    assert reply["usage"]["completion_tokens"] <= 12


def test_a_prompt_beyond_the_limit_is_refused(make_service: MakeService) -> None:
    client = client_of(make_service(max_prompt_tokens=10))
    assert client.post(COMPLETIONS, json={"prompt": "x" * 10}).status_code == 200
    response = client.post(COMPLETIONS, json={"prompt": "x" * 11})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    for prompt in ([256], [[1], [2**31]], [], [[]], [""], [1, "a"], [-1]):
        assert client.post(COMPLETIONS, json={"prompt": prompt}).status_code == 400


def test_an_earlier_text_is_not_read_again(client: TestClient) -> None:
    first = client.post(CHAT, json=ask("one")).json()
    answer = first["choices"][0]["message"]["content"]
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "two"},
    ]
    second = client.post(CHAT, json={"messages": messages}).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 6


def test_the_page_runs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in page.text
    assert "https://" not in page.text
    for name in ("page", "markdown", "server", "store"):
        script = client.get(f"/{name}.js")
        assert script.headers["content-type"].startswith("text/javascript")
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert way not in script.text
