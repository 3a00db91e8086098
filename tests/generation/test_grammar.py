"""Constrained answers: the grammar holds, and the text is that of plain constrained decoding."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream.config import DecodeConfig, PruneSpec, TreeSpec
from mlx_specstream.errors import DataError, OptionError
from mlx_specstream.generation.generate import stream_generate
from mlx_specstream.generation.grammar import Grammar
from mlx_specstream.speculation.result import StepReport
from mlx_specstream.speculation.sampling import TokenSampler
from tests.speculation.test_sampling import tree_from
from tests.support import tiny
from tests.support.engine import (
    decode,
    mlx_lm_tokens,
    plain,
    random_streams,
    stream_config,
    stream_decoder,
    table_decoder,
)
from tests.support.scripted import right_drafts, with_streams
from tests.support.tokenizers import KINDS

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "enum": ["ann", "bob", "anna"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
LARK = 'start: "(" inside ")"\ninside: start start | /[a-c]{1,3}/'
PROMPT = list(b"say it")


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return tiny.byte_tokenizer()


def grammar(tokenizer: TokenizerWrapper, kind: str, vocab_size: int = 256) -> Grammar:
    if kind == "schema":
        return Grammar.json_schema(tokenizer, SCHEMA, vocab_size)
    if kind == "lark":
        return Grammar.lark(tokenizer, LARK, vocab_size)
    return Grammar.regex(tokenizer, "(ab|cd){2,4}[xyz]+", vocab_size)


def fits(kind: str, text: str) -> bool:
    if kind == "schema":
        value = json.loads(text)
        return set(value) == {"name", "age"} and 0 <= value["age"] <= 120
    if kind == "regex":
        return re.fullmatch("(ab|cd){2,4}[xyz]+", text) is not None
    reduced = text
    while (after := re.sub(r"\((?:[a-c]{1,3}|SS)\)", "S", reduced)) != reduced:
        reduced = after
    return reduced == "S"


def until_end(tokens: Sequence[int]) -> list[int]:
    tokens = list(tokens)
    return tokens[: tokens.index(tiny.EOS)] if tiny.EOS in tokens else tokens


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"propertyNames": {"type": "string"}, "additionalProperties": {"const": 1}}, '{"a": 1}'),
        ({"properties": {"propertyNames": {"const": 1}}}, '{"propertyNames": 1}'),
        ({"properties": {"a": {"propertyNames": True, "type": "object"}}}, '{"a": {"b": 2}}'),
        ({"properties": {"a": {"enum": [{"propertyNames": {}}]}}}, '{"a": {"propertyNames": {}}}'),
    ],
)
def test_that_names_are_texts_need_not_be_said(
    tokenizer: TokenizerWrapper, schema: dict[str, object], text: str
) -> None:
    """zod says so of its records; a property may have any name, and values are no schemas."""
    made = Grammar.json_schema(tokenizer, {"type": "object", **schema}, 256).matcher()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert made.try_consume_tokens(tokens) == len(tokens)
    assert made.is_accepting()


def test_names_that_must_fit_a_pattern_are_refused(tokenizer: TokenizerWrapper) -> None:
    with pytest.raises(DataError, match="propertyNames"):
        Grammar.json_schema(tokenizer, {"propertyNames": {"pattern": "^a"}}, 256)


@pytest.mark.parametrize("kind", KINDS)
def test_blanks_are_blanks_in_every_kind_of_vocabulary(kind: str) -> None:
    fast = KINDS[kind][0]()
    fast.add_special_tokens({"eos_token": "<eos>"})
    made = Grammar.regex(wrapped := TokenizerWrapper(fast), r" ?l est 👍", len(fast)).matcher()
    tokens = wrapped.encode("l est 👍", add_special_tokens=False)
    assert made.try_consume_tokens(tokens) == len(tokens)
    assert made.is_accepting()


@pytest.mark.parametrize("kind", ["schema", "lark", "regex"])
def test_constrained_greedy_is_plain_constrained_decoding(
    kind: str, tokenizer: TokenizerWrapper, tiny_llama: nn.Module
) -> None:
    """The oracle is mlx-lm's own loop with the same processor."""
    compiled = grammar(tokenizer, kind)
    # End the answer as soon as it may end, lest the tiny model goes on for ever.
    bias = make_logits_processors(logit_bias={tiny.EOS: 30.0, ord(")"): 5.0})
    expected = mlx_lm_tokens(
        tiny_llama, PROMPT, 40, logits_processors=[compiled.processor(), *bias]
    )
    assert fits(kind, tokenizer.decode(until_end(expected)))
    streams = random_streams(tiny_llama, stream_config(num_streams=3))
    length = len(until_end(expected)) + 1
    for make, shape, prune in (
        (stream_decoder, "chain", None),
        (table_decoder, "12", None),
        (table_decoder, "12", PruneSpec(4)),
    ):
        token_sampler = TokenSampler(processors=[compiled.processor(), *bias])
        config = DecodeConfig(TreeSpec.parse(shape), prune)
        run = decode(make(streams, config, token_sampler=token_sampler), PROMPT, length)
        assert run.tokens[:length] == expected[:length]
    token_sampler = TokenSampler(processors=[compiled.processor(), *bias])
    assert plain(streams, PROMPT, length, token_sampler=token_sampler).tokens == expected[:length]


def test_right_drafts_are_accepted_under_a_grammar(
    tokenizer: TokenizerWrapper, tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_streams(tiny_llama)
    processor = grammar(tokenizer, "schema").processor()
    bias = make_logits_processors(logit_bias={tiny.EOS: 30.0})

    def answer(speculative: bool, before: Sequence[int] = ()) -> list[int]:
        return [
            response.token
            for response in stream_generate(
                model,
                tokenizer,
                [*before, *PROMPT],
                max_tokens=40,
                logits_processors=[processor, *bias],
                speculative=speculative,
            )
        ]

    expected = answer(speculative=False)
    assert expected[-1] == tiny.EOS
    # One processor serves one answer after the other.
    assert fits("schema", tokenizer.decode(answer(True, before=b"please ")[:-1]))
    steps = right_drafts(monkeypatch, expected, PROMPT)
    assert answer(speculative=True) == expected
    assert len(steps) <= len(expected) / 3


@pytest.mark.parametrize("kind", ["schema", "lark"])
def test_sampled_answers_fit(kind: str, tokenizer: TokenizerWrapper, tiny_llama: nn.Module) -> None:
    compiled = grammar(tokenizer, kind)
    streams = random_streams(tiny_llama, stream_config(num_streams=3))
    bias = make_logits_processors(logit_bias={tiny.EOS: 5.0, ord(")"): 4.0})
    texts = set()
    for seed in range(3):
        mx.random.seed(seed)
        sampler = make_sampler(temp=1.5, top_p=0.95)
        token_sampler = TokenSampler(sampler, [compiled.processor(), *bias])
        run = decode(
            table_decoder(streams, DecodeConfig(TreeSpec(rows=8)), token_sampler=token_sampler),
            PROMPT,
            60,
        )
        text = tokenizer.decode(until_end(run.tokens))
        texts.add(text)
        assert fits(kind, text), text
    assert len(texts) > 1


def test_every_row_has_the_mask_of_its_own_ancestors(tokenizer: TokenizerWrapper) -> None:
    compiled = Grammar.regex(tokenizer, "a(b|cd)e?", 270)
    a, b, c, d, e, eos = *b"abcde", tiny.EOS
    processor = compiled.processor()
    processor.begin(2)
    # root a ── b ── e ── eos, b ── eos ── a, c ── d, and x, which violates, ── b
    tokens = [a, b, c, ord("x"), e, d, b, eos, eos, a]
    tree = tree_from(tokens, [0, 0, 0, 0, 1, 2, 3, 4, 1, 8])
    mask = processor.at_nodes([7, 8], tree)
    logits = mx.zeros((1, 270))
    allowed = [
        np.flatnonzero(np.isfinite(np.array(mask(mx.array([node]), logits))[0])).tolist()
        for node in range(len(tokens))
    ]
    end = [eos]
    assert allowed[:3] == [[b, c], [e, eos], [d]]
    assert allowed[4:6] == [end, [e, eos]]
    assert allowed[7:] == [end, end, end]
    # The matcher is back at the root, and goes where the text went.
    after = processor(mx.array([7, 8, a, c, d]), logits)
    assert np.flatnonzero(np.isfinite(np.array(after)[0])).tolist() == [e, eos]
    after = processor(mx.array([7, 8, a]), logits)
    assert np.flatnonzero(np.isfinite(np.array(after)[0])).tolist() == [b, c]


@pytest.mark.parametrize("token", [31, 32, 63, 255])
def test_end_tokens_are_allowed_at_the_end_alone(token: int, tokenizer: TokenizerWrapper) -> None:
    wrapped = tiny.byte_tokenizer()
    wrapped.eos_token_ids = {token}
    processor = Grammar.regex(wrapped, "a", 256).processor()
    logits = mx.zeros((1, 256))
    for text, allowed in (([1], [97]), ([1, 97], [token]), ([1, 97, token], [token])):
        row = np.array(processor(mx.array(text), logits))[0]
        assert np.flatnonzero(np.isfinite(row)).tolist() == allowed


def test_the_tree_is_all_a_step_waits_for_more(
    tokenizer: TokenizerWrapper, tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_specstream.generation import grammar as grammar_module

    waits: list[str] = []
    real_ints, real_report = grammar_module.to_ints, StepReport.read
    monkeypatch.setattr(grammar_module, "to_ints", lambda a: waits.append("tree") or real_ints(a))
    monkeypatch.setattr(StepReport, "read", lambda *a: waits.append("report") or real_report(*a))
    streams = random_streams(tiny_llama, stream_config())
    token_sampler = TokenSampler(processors=[grammar(tokenizer, "schema").processor()])
    decode(
        stream_decoder(streams, DecodeConfig(TreeSpec(rows=6)), token_sampler=token_sampler),
        PROMPT,
        6,
    )
    steps = waits.count("report")
    assert waits == ["tree", "tree", "report"] * steps


def test_mistakes_are_one_sentence(
    tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    for make, text, wanted in (
        (Grammar.regex, "[a", "invalid regular expression: unclosed character class.$"),
        (Grammar.json_schema, '{"pattern": "^(?=a)", "type": "string"}', "look-around"),
        (Grammar.json_schema, '{"$ref": "#"}', "nothing fits it"),
        (
            Grammar.json_schema,
            '{"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#"}]}}}',
            "nothing fits it",
        ),
        (Grammar.lark, "start: start", "nothing fits it"),
        (Grammar.lark, "start: foo", "unknown name"),
        (Grammar.json_schema, "{", "no JSON"),
        (Grammar.json_schema, "[1]", "must be an object, got list"),
        (Grammar.json_schema, '{"type": "foo"}', "Invalid type"),
    ):
        with pytest.raises(DataError, match=wanted) as caught:
            make(tokenizer, text, 256)
        assert "\n" not in str(caught.value)
    processor = Grammar.regex(tokenizer, "ab", 256).processor()
    processor.begin(1)
    with pytest.raises(OptionError, match="does not fit its grammar"):
        processor(mx.array([1, ord("x")]), mx.zeros((1, 256)))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError, match=r"mlx-specstream\[grammar\]"):
        Grammar.regex(tokenizer, "a", 256)


def test_json_has_no_choice_of_blanks_unless_asked(tokenizer: TokenizerWrapper) -> None:
    def allows(text: str, **guidance: object) -> bool:
        schema = {"type": "object", **({"x-guidance": guidance} if guidance else {})}
        matcher = Grammar.json_schema(tokenizer, schema, len(tokenizer.get_vocab())).matcher()
        tokens = tokenizer.encode(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    assert allows('{"a": [1, {"b": null}], "c": {}}')
    for blank in (' {"a": 1}', '{ "a": 1}', '{"a":  1}', '{"a": 1 }', '{"a":\n1}', '{"a": 1} '):
        assert not allows(blank), blank
    assert allows('{  "a"  :1}', whitespace_flexible=True)
    assert allows('{\n  "a":1}', whitespace_pattern=r"[ \n]{0,9}")
