"""Text in, text out, beside mlx-lm's own generation and with drafts that are always right."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import GenerationResponse as MlxLmResponse
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream import generate, stream_generate
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.errors import ModelError, OptionError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.result import StepReport
from tests.support import tiny
from tests.support.scripted import NUM_STREAMS, assert_holds, right_drafts, script, with_streams

PROMPT = list(b"a tiny prompt")
CHAIN = DecodeConfig(TreeSpec.parse("chain"))
TREES = ["chain", "2", "8", "2^3"]


@pytest.fixture(scope="module")
def model(tiny_llama: nn.Module) -> StreamModel:
    return with_streams(tiny_llama)


def tree(name: str) -> DecodeConfig:
    return DecodeConfig(TreeSpec.parse(name))


def run(model: Any, tokenizer: TokenizerWrapper, prompt: Any = PROMPT, **options: Any) -> list[Any]:
    return list(stream_generate(model, tokenizer, prompt, **options))


def text_of(responses: list[Any]) -> str:
    return "".join(response.text for response in responses)


def tokens_of(responses: list[Any]) -> list[int]:
    return [response.token for response in responses]


# -- the same as mlx-lm -------------------------------------------------------------------------


def test_bare_models_give_mlx_lms_answer(
    tiny_family: nn.Module, byte_tokenizer: TokenizerWrapper
) -> None:
    theirs = list(mlx_lm.stream_generate(tiny_family, byte_tokenizer, PROMPT, max_tokens=30))
    ours = run(tiny_family, byte_tokenizer, max_tokens=30)
    assert tokens_of(ours) == tokens_of(theirs)
    assert [r.text for r in ours] == [r.text for r in theirs]
    assert [r.finish_reason for r in ours] == [r.finish_reason for r in theirs]
    assert [r.generation_tokens for r in ours] == [r.generation_tokens for r in theirs]


@pytest.mark.parametrize("name", TREES)
def test_speculation_gives_mlx_lms_answer(
    model: StreamModel, byte_tokenizer: TokenizerWrapper, name: str
) -> None:
    for prompt in ("x", "a tiny prompt", "something\nelse"):
        theirs = mlx_lm.generate(model.model, byte_tokenizer, prompt, max_tokens=25)
        assert generate(model, byte_tokenizer, prompt, max_tokens=25, config=tree(name)) == theirs


def test_responses_have_mlx_lms_fields(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    theirs = list(mlx_lm.stream_generate(model.model, byte_tokenizer, PROMPT, max_tokens=8))
    ours = run(model, byte_tokenizer, max_tokens=8)
    for mine, other in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(MlxLmResponse):
            assert type(getattr(mine, field.name)) is type(getattr(other, field.name)), field.name
        np.testing.assert_allclose(np.array(mine.logprobs), np.array(other.logprobs), atol=1e-4)
        assert mine.prompt_tokens == len(PROMPT)


def test_processors_see_every_tokens_own_history(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    processors = make_logits_processors(repetition_penalty=1.5, repetition_context_size=6)
    theirs = list(
        mlx_lm.stream_generate(
            model.model, byte_tokenizer, PROMPT, max_tokens=20, logits_processors=processors
        )
    )
    for speculative in (False, True):
        ours = run(
            model,
            byte_tokenizer,
            max_tokens=20,
            logits_processors=processors,
            speculative=speculative,
        )
        assert tokens_of(ours) == tokens_of(theirs)
        np.testing.assert_allclose(
            np.array(ours[-1].logprobs), np.array(theirs[-1].logprobs), atol=1e-4
        )


def test_shared_streams_give_their_plain_answer(
    tiny_llama: nn.Module, byte_tokenizer: TokenizerWrapper
) -> None:
    shared = with_streams(tiny_llama, mode="shared")
    plain = tokens_of(run(shared, byte_tokenizer, max_tokens=20, speculative=False))
    assert plain != tokens_of(run(tiny_llama, byte_tokenizer, max_tokens=20))
    for name in TREES:
        ours = run(shared, byte_tokenizer, max_tokens=20, config=tree(name))
        assert tokens_of(ours) == plain


def test_sampling_repeats_with_its_seed(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    answers = []
    for _ in range(2):
        mx.random.seed(7)
        sampler = make_sampler(temp=1.0, top_p=0.9, top_k=20)
        answers.append(tokens_of(run(model, byte_tokenizer, max_tokens=12, sampler=sampler)))
    assert answers[0] == answers[1]
    assert answers[0] != tokens_of(run(model, byte_tokenizer, max_tokens=12))


def test_prompts_may_be_text_ids_or_an_array(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    forms = (bytes(PROMPT).decode(), PROMPT, tuple(PROMPT), mx.array(PROMPT))
    answers = [tokens_of(run(model, byte_tokenizer, form, max_tokens=6)) for form in forms]
    assert all(answer == answers[0] for answer in answers)


def test_progress_of_the_prompt(model: StreamModel, byte_tokenizer: TokenizerWrapper) -> None:
    seen: list[tuple[int, int]] = []
    run(
        model,
        byte_tokenizer,
        max_tokens=1,
        prefill_step_size=5,
        prompt_progress_callback=lambda *step: seen.append(step),
    )
    assert seen == [(0, 13), (5, 13), (10, 13), (12, 13), (13, 13)]


def test_verbose_prints_text_and_figures(
    model: StreamModel, byte_tokenizer: TokenizerWrapper, capsys: pytest.CaptureFixture[str]
) -> None:
    text = generate(model, byte_tokenizer, PROMPT, verbose=True, max_tokens=9)
    printed = capsys.readouterr().out
    assert text in printed
    assert "Prompt: 13 tokens" in printed
    assert "Speculation: 9 tokens in" in printed


# -- ends inside an accepted path ---------------------------------------------------------------

ENDS: dict[str, tuple[bytes, dict[str, Any], str, int, str]] = {
    # what the model would write, options, the text that comes out, its tokens, why it ended
    "end of turn": (b"ab" + bytes([tiny.EOS]) + b"cd", {}, "ab", 3, "stop"),
    "end of turn at the end": (b"abcd" + bytes([tiny.EOS]) + b"e", {}, "abcd", 5, "stop"),
    "end of turn first": (bytes([tiny.EOS]) + b"abcd", {}, "", 1, "stop"),
    "max_tokens": (b"abcdefgh", {"max_tokens": 3}, "abc", 3, "length"),
    "max_tokens is 1": (b"abcdefgh", {"max_tokens": 1}, "a", 1, "length"),
    "stop string": (b"one ### two", {"stop": ["###"]}, "one ", 7, "stop"),
    "stop string over two paths": (b"oneone ### two", {"stop": ["###"]}, "oneone ", 10, "stop"),
    "first of two stop strings": (b"abcdef", {"stop": ["cd", "bcd"]}, "a", 4, "stop"),
    "beginning of a stop string": (
        b"ab##",
        {"stop": ["###"], "max_tokens": 4},
        "ab##",
        4,
        "length",
    ),
    "stop string at max_tokens": (b"ab##", {"stop": ["##"], "max_tokens": 4}, "ab", 4, "stop"),
    "stop string at end of turn": (
        b"ab##" + bytes([tiny.EOS]),
        {"stop": ["###"]},
        "ab##",
        5,
        "stop",
    ),
    "half a character": ("aé".encode(), {"max_tokens": 2}, "a\ufffd", 2, "length"),
    "stop string of several bytes": ("ab→c".encode(), {"stop": ["→"]}, "ab", 5, "stop"),
}


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("case", ENDS)
def test_an_answer_ends_where_it_should(
    case: str,
    speculative: bool,
    model: StreamModel,
    byte_tokenizer: TokenizerWrapper,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, options, text, num_tokens, reason = ENDS[case]
    steps = right_drafts(monkeypatch, list(written), PROMPT)
    cache = KVCache(model.backbone.num_layers)
    responses = run(
        model,
        byte_tokenizer,
        logits_processors=[script(list(written), PROMPT)],
        prompt_cache=cache,
        speculative=speculative,
        **{"max_tokens": 64, **options},
    )
    assert text_of(responses) == text
    assert tokens_of(responses) == list(written[:num_tokens])
    assert [r.finish_reason for r in responses] == [None] * (num_tokens - 1) + [reason]
    assert_holds(cache, model, [*PROMPT, *written[: num_tokens - 1]])
    if speculative:
        passes = -(-num_tokens // (NUM_STREAMS + 1))
        assert len(steps) == passes, "a step was scheduled after the end"
        assert responses[-1].stats.passes == passes


def test_characters_come_out_whole(
    model: StreamModel, byte_tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "naïve 😀 → 中文 end"
    written = [*text.encode(), tiny.EOS]
    right_drafts(monkeypatch, written, PROMPT)
    for speculative in (True, False):
        responses = run(
            model,
            byte_tokenizer,
            logits_processors=[script(written, PROMPT)],
            speculative=speculative,
        )
        assert text_of(responses) == text
        assert not any("\ufffd" in response.text for response in responses)


def test_figures_add_up(
    model: StreamModel, byte_tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = list(b"abcdefghijklmnop")
    right_drafts(monkeypatch, written, PROMPT)
    processors = [script(written, PROMPT)]
    responses = run(model, byte_tokenizer, max_tokens=12, logits_processors=processors)
    stats = responses[-1].stats
    assert (stats.passes, stats.tokens, stats.drafted) == (3, 12, 12)
    assert [r.origin for r in responses] == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]
    assert [r.from_draft for r in responses] == [r.origin > 0 for r in responses]
    assert stats.accepted == 10
    assert stats.histogram == (0, 0, 1, 0, 2)
    assert stats.tokens_per_step == 4.0
    plain = run(model, byte_tokenizer, max_tokens=5, speculative=False)[-1].stats
    assert (plain.passes, plain.drafted, plain.tokens_per_step) == (5, 0, 1.0)


# -- what is left behind ------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [1, 3, 5, 6])
def test_a_closed_generator_can_be_continued(
    taken: int,
    model: StreamModel,
    byte_tokenizer: TokenizerWrapper,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tokens_of(run(model, byte_tokenizer, max_tokens=12))
    cache = KVCache(model.backbone.num_layers)
    with monkeypatch.context() as patch:
        right_drafts(patch, whole, PROMPT)
        responses = stream_generate(model, byte_tokenizer, PROMPT, prompt_cache=cache, config=CHAIN)
        first = [next(responses).token for _ in range(taken)]
        responses.close()
    assert first == whole[:taken]
    assert_holds(cache, model, [*PROMPT, *first[:-1]])
    rest = run(model, byte_tokenizer, first[-1:], max_tokens=12 - taken, prompt_cache=cache)
    assert first + tokens_of(rest) == whole


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_interrupt_leaves_a_whole_cache(
    place: int,
    model: StreamModel,
    byte_tokenizer: TokenizerWrapper,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = StepReport.read, 0

    def interrupted(report: StepReport) -> Any:
        nonlocal calls
        calls += 1
        if calls > place:
            raise KeyboardInterrupt
        return original(report)

    monkeypatch.setattr(StepReport, "read", interrupted)
    cache = KVCache(model.backbone.num_layers)
    given: list[int] = []
    responses = stream_generate(model, byte_tokenizer, PROMPT, prompt_cache=cache)
    with pytest.raises(KeyboardInterrupt):
        given.extend(response.token for response in responses)
    assert_holds(cache, model, [*PROMPT, *given][: len(PROMPT) - 1 + len(given)])


def test_mlx_lms_cache_goes_on_as_mlx_lm_leaves_it(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    def two_turns(stream: Callable[..., Any], cache: list[Any]) -> list[int]:
        found = []
        for prompt in (PROMPT, list(b"and then")):
            found += tokens_of(
                list(stream(model, byte_tokenizer, prompt, max_tokens=7, prompt_cache=cache))
            )
        return found

    def theirs(_: StreamModel, *arguments: Any, **options: Any) -> Any:
        return mlx_lm.stream_generate(model.model, *arguments, **options)

    our_cache, their_cache = make_prompt_cache(model), make_prompt_cache(model.model)
    assert two_turns(stream_generate, our_cache) == two_turns(theirs, their_cache)
    assert [c.offset for c in our_cache] == [c.offset for c in their_cache]


# -- bad input ----------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty text": ("", {}, "the prompt is empty"),
    "no ids": ([], {}, "the prompt is empty"),
    "unknown id": ([5, 256], {}, "token id 256, but the model's ids are 0 to 255"),
    "negative id": ([-1], {}, "token id -1"),
    "two dimensions": (mx.zeros((1, 4), dtype=mx.int32), {}, "one dimension"),
    "too long": ([1] * 512, {}, "512 tokens, but the model's context holds 512"),
    "no tokens": (PROMPT, {"max_tokens": 0}, "max_tokens must be at least 1"),
    "fewer than none": (PROMPT, {"max_tokens": -2}, "max_tokens must be at least 1"),
    "chunks of nothing": (PROMPT, {"prefill_step_size": 0}, "prefill_step_size"),
    "empty stop string": (PROMPT, {"stop": [""]}, "stop strings"),
    "rotating cache": (PROMPT, {"max_kv_size": 3}, "max_kv_size must be above 4"),
    "quantised cache": (PROMPT, {"kv_bits": 8}, "cannot use a cache of 8 bits in groups of 64"),
    "embeddings": (PROMPT, {"input_embeddings": object()}, "input_embeddings of mlx-lm is not"),
    "no chain": (PROMPT, {"num_draft_tokens": 0}, "num_draft_tokens must be 1 to"),
    "unknown option": (PROMPT, {"temprature": 1}, "no option 'temprature'"),
    "another model's cache": (PROMPT, {"prompt_cache": KVCache(3)}, "3 layers and the model 4"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_by_the_call(
    case: str, model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    prompt, options, sentence = WRONG[case]
    with pytest.raises(OptionError, match=sentence):
        stream_generate(model, byte_tokenizer, prompt, **options)


def test_options_that_are_not_in_use_are_let_through(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    options = {"max_kv_size": None, "kv_bits": None, "kv_group_size": 64, "draft_model": None}
    assert len(run(model, byte_tokenizer, max_tokens=2, **options)) == 2


def test_an_answer_ends_with_the_context(
    model: StreamModel, byte_tokenizer: TokenizerWrapper, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = [1] * 507
    with caplog.at_level(logging.WARNING):
        responses = run(model, byte_tokenizer, prompt, max_tokens=20)
    assert len(responses) == 5
    assert responses[-1].finish_reason == "length"
    assert "at most 5 more tokens" in caplog.text
    assert tokens_of(run(model, byte_tokenizer, prompt, max_tokens=-1)) == tokens_of(responses)


def test_nan_is_said(byte_tokenizer: TokenizerWrapper) -> None:
    broken = tiny.tiny_model("llama")
    model = with_streams(broken)
    broken.model.norm.weight = mx.full(broken.model.norm.weight.shape, mx.nan)
    with pytest.raises(ModelError, match=r"not a number \(NaN\)"):
        run(model, byte_tokenizer)
    with pytest.raises(ModelError, match=r"not a number \(NaN\)"):
        run(broken, byte_tokenizer)


def test_other_families_are_refused(byte_tokenizer: TokenizerWrapper) -> None:
    from mlx_lm.models import gpt2

    other = gpt2.Model(gpt2.ModelArgs("gpt2", 64, 32, 2, 1, 32, 1e-5, 64))
    with pytest.raises(ModelError, match=r"'gpt2' cannot be decoded by mlx-specstream: .*position"):
        stream_generate(other, byte_tokenizer, PROMPT)
