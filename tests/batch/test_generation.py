"""A batch's answers are those that `stream_generate` gives one by one."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream import batch_generate, stream_generate
from mlx_specstream.batch.generation import BatchAnswer
from mlx_specstream.errors import OptionError
from mlx_specstream.loading.load import StreamModel
from tests.batch.engine import assert_fresh
from tests.support.scripted import with_streams

PROMPTS = ["one", "The second prompt.", "3", "and a fourth, of some length, to be cut in chunks"]


@pytest.mark.parametrize("speculative", [True, False])
def test_answers_are_those_of_one_prompt_at_a_time(
    tiny_llama: nn.Module, byte_tokenizer: TokenizerWrapper, speculative: bool
) -> None:
    model = with_streams(tiny_llama)
    limits = [9, 30, 1, 17]
    ended: list[tuple[int, BatchAnswer]] = []
    found = batch_generate(
        model,
        byte_tokenizer,
        PROMPTS,
        limits,
        sampler=make_sampler(temp=1.0),
        logits_processors=make_logits_processors(repetition_penalty=1.2),
        seed=7,
        stop=["x"],
        speculative=speculative,
        completion_batch_size=2,
        prefill_step_size=10,
        return_prompt_caches=True,
        on_answer=lambda index, answer: ended.append((index, answer)),
    )
    assert found.caches is not None
    assert model.streams is not None
    for index, prompt in enumerate(PROMPTS):
        alone = list(
            stream_generate(
                model,
                byte_tokenizer,
                prompt,
                limits[index],
                sampler=make_sampler(temp=1.0),
                logits_processors=make_logits_processors(repetition_penalty=1.2),
                seed=7 + index,
                stop=["x"],
                speculative=False,
            )
        )
        answer = found.answers[index]
        assert answer.token_ids == [response.token for response in alone]
        assert answer.text == found.texts[index] == "".join(response.text for response in alone)
        assert answer.finish_reason == alone[-1].finish_reason
        text = [*byte_tokenizer.encode(prompt), *answer.token_ids[:-1]]
        assert_fresh(found.caches[index], model.streams, text)
        assert answer.stats.tokens == len(answer.token_ids)
        assert (answer.stats.drafted > 0) == (speculative and answer.stats.passes > 1)
    assert sorted(index for index, _ in ended) == [0, 1, 2, 3]
    assert all(answer is not None and answer == found.answers[index] for index, answer in ended)
    assert found.stats.prompt_tokens == sum(len(byte_tokenizer.encode(p)) for p in PROMPTS)
    assert found.stats.generation_tokens == sum(map(len, found.token_ids))
    assert found.stats.steps < sum(answer.stats.passes for answer in found.answers)


def test_a_bare_model_and_ids(
    tiny_llama: nn.Module, byte_tokenizer: TokenizerWrapper, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [byte_tokenizer.encode(prompt) for prompt in PROMPTS]
    found = batch_generate(tiny_llama, byte_tokenizer, ids, 6, verbose=True)
    assert "tokens-per-sec" in capsys.readouterr().out
    for prompt, answer in zip(ids, found.answers, strict=True):
        logits = tiny_llama(mx.array([[*prompt, *answer.token_ids]]))[0, len(prompt) - 1 : -1]
        assert mx.argmax(logits, axis=-1).tolist() == answer.token_ids
    assert batch_generate(tiny_llama, byte_tokenizer, []).texts == []


def test_a_batch_that_is_over_keeps_what_was_written(
    tiny_llama: nn.Module, byte_tokenizer: TokenizerWrapper
) -> None:
    model = with_streams(tiny_llama)
    whole = batch_generate(
        model, byte_tokenizer, PROMPTS, 20, speculative=False, return_prompt_caches=True
    )
    assert whole.caches is not None
    asked: list[int] = []
    ended: list[int] = []

    def is_over(tokens: int) -> bool:
        asked.append(tokens)
        return tokens >= 9

    cut = batch_generate(
        model,
        byte_tokenizer,
        PROMPTS,
        20,
        speculative=False,
        completion_batch_size=3,
        return_prompt_caches=True,
        on_answer=lambda index, _: ended.append(index),
        is_over=is_over,
    )
    assert sorted(ended) == [0, 1, 2]  # the fourth had not begun
    assert asked == sorted(asked)
    assert asked[-1] == cut.stats.generation_tokens >= 9 > asked[-2]
    assert cut.answers[3].token_ids == []
    assert cut.caches is not None
    for index in ended:
        answer, full = cut.answers[index], whole.answers[index]
        assert 0 < len(answer.token_ids) < 20
        assert answer.token_ids == full.token_ids[: len(answer.token_ids)]
        assert answer.finish_reason == "length"
        assert answer.text == byte_tokenizer.decode(answer.token_ids)
        length = len(PROMPTS[index]) + len(answer.token_ids) - 1
        assert cut.caches[index].length == length


def test_finished_answers_leave_no_caches_behind(
    tiny_llama: nn.Module, byte_tokenizer: TokenizerWrapper
) -> None:
    """Distilling asks thousands of prompts in one call."""
    model = StreamModel.plain(tiny_llama)
    bytes_at: list[int] = []

    def note(*_: object) -> None:
        mx.synchronize()
        bytes_at.append(mx.get_active_memory())

    batch_generate(
        model, byte_tokenizer, ["prompt"] * 40, 4, completion_batch_size=2, on_answer=note
    )
    # A finished answer's cache is two columns' worth of this model's; none of them may pile up.
    assert bytes_at[-1] <= bytes_at[len(bytes_at) // 2]


def test_what_cannot_be_used_is_refused(
    tiny_llama: nn.Module, byte_tokenizer: TokenizerWrapper
) -> None:
    model = with_streams(tiny_llama)
    for options, message in (
        ({"max_tokens": [1, 2]}, "2 entries for 4"),
        ({"seed": [1, 2]}, "seed has 2 entries for 4"),
        ({"seed": []}, "seed has 0 entries for 4"),
        ({"completion_batch_size": 0}, "completion_batch_size"),
        ({"max_tokens": 0}, "max_tokens"),
    ):
        with pytest.raises(OptionError, match=message):
            batch_generate(model, byte_tokenizer, PROMPTS, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="empty"):
        batch_generate(model, byte_tokenizer, ["a", ""])
