"""Values that no call can use are refused by it, in one sentence; odd forms of good ones are taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream import DecodeConfig, batch_generate, generate
from mlx_specstream.config import CacheConfig, PruneSpec, SamplingConfig, TreeSpec, TypicalSpec
from mlx_specstream.errors import SpecStreamError
from mlx_specstream.loading.load import StreamModel
from tests.support.scripted import with_streams

PROMPT = [97, 98]
CHAIN = DecodeConfig.parse("chain")
NO_NUMBERS: list[Any] = [math.nan, "1", "x", [], [1, 2, 3], {}, True, b"x", object(), mx.array(3)]
NOT_WHOLE: list[Any] = [*NO_NUMBERS, 1.5, math.inf, -math.inf]
NO_TEXTS: list[Any] = [math.nan, 5, {"a": 1}, True, object(), mx.array(3), [5], [None], [""]]
NO_FUNCTIONS: list[Any] = [0, 1.5, "x", [1], {}, True, mx.array(3)]

GENERATE: dict[str, list[Any]] = {
    "max_tokens": [*NOT_WHOLE, None, 0, -2],
    "seed": NOT_WHOLE,
    "max_kv_size": [*NOT_WHOLE, 4, 2**63],
    "kv_bits": [*NOT_WHOLE, 7, 16],
    "prefill_step_size": [*NOT_WHOLE, None, 0, -1],
    "config": [5, "16:8", [CHAIN], {}, math.nan],
    "stop": NO_TEXTS,
    "sampler": NO_FUNCTIONS,
    "logits_processors": [*NO_FUNCTIONS[:-1], len, [None]],
    "prompt_cache": [5, "x", [1], {"a": 1}, math.nan, True],
    "prompt_progress_callback": NO_FUNCTIONS,
}
BATCH: dict[str, list[Any]] = {
    "max_tokens": [*NOT_WHOLE, None, 0, [1, math.nan], [1]],
    "seed": [*NOT_WHOLE, ["a", 1]],
    "completion_batch_size": [*NOT_WHOLE, None, 0],
    "prefill_step_size": [*NOT_WHOLE, None, 0],
    "config": GENERATE["config"],
    "stop": NO_TEXTS,
    "sampler": NO_FUNCTIONS,
    "logits_processors": [*NO_FUNCTIONS[:-1], [None]],
    "on_answer": NO_FUNCTIONS,
}
CONFIGS: dict[Callable[..., Any], dict[str, list[Any]]] = {
    SamplingConfig: {
        "temp": [*NO_NUMBERS, None, math.inf, -1, 10**400],
        "top_k": [*NOT_WHOLE, None, -1, 2**31],
        "seed": [*NOT_WHOLE, -1],
        "repetition_penalty": [*NO_NUMBERS, None, 0],
        "logit_bias": [[], 5, None, {1: math.inf}, {1: "x"}, {"1": 1.0}, {1.5: 1.0}, {True: 1.0}],
    },
    TreeSpec: {
        "rows": [*NOT_WHOLE, None, 0],
        "branching": [*NOT_WHOLE, None, 65],
        "depth": [*NOT_WHOLE, None, -1],
    },
    PruneSpec: {"keep": [*NOT_WHOLE, None, 0]},
    TypicalSpec: {"epsilon": [*NO_NUMBERS, None, 0], "delta": [*NO_NUMBERS, None, 2]},
    DecodeConfig: {
        "tree": ["16", 16, None],
        "prune": [8, "8"],
        "typical": [0.09],
        "stream_nodes": NOT_WHOLE,
    },
    CacheConfig: {"kv_group_size": [*NOT_WHOLE, 65], "quantized_kv_start": [*NOT_WHOLE, None, -1]},
}
NO_PROMPTS: list[Any] = [
    *("", [], mx.array([]), [-1], [256], [2**70], [1.5], [math.inf], ["a"], ["97"], [True], [[1]]),
    *(None, 5, b"abc", {97: 98}, {97}, np.zeros((1, 2), int), mx.array([1.5]), "a \ud83d b"),
]


@pytest.fixture(scope="module")
def model(tiny_llama: nn.Module) -> StreamModel:
    return with_streams(tiny_llama)


def is_one_sentence(error: BaseException) -> bool:
    text = str(error)
    return (
        10 < len(text) < 300
        and "\n" not in text
        and text.endswith(".")
        and "object at" not in text[:20]
    )


def test_generate_refuses_by_the_call(model: StreamModel, byte_tokenizer: TokenizerWrapper) -> None:
    for name, values in GENERATE.items():
        for value in values:
            options = {"max_tokens": 3, "config": CHAIN, name: value}
            with pytest.raises(SpecStreamError) as refused:
                generate(model, byte_tokenizer, PROMPT, **options)
            assert is_one_sentence(refused.value), (name, value)


def test_batches_refuse_before_a_token(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    for name, values in BATCH.items():
        for value in values:
            options = {"max_tokens": 3, "config": CHAIN, name: value}
            with pytest.raises(SpecStreamError) as refused:
                batch_generate(model, byte_tokenizer, [PROMPT, [99]], **options)
            assert is_one_sentence(refused.value), (name, value)


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_that_exist_make_sense(config: Callable[..., Any]) -> None:
    for name, values in CONFIGS[config].items():
        for value in values:
            with pytest.raises(SpecStreamError) as refused:
                config(**{**({"keep": 3} if config is PruneSpec else {}), name: value})
            assert is_one_sentence(refused.value), (name, value)


@pytest.mark.parametrize("prompt", NO_PROMPTS, ids=repr)
def test_what_is_no_prompt(
    prompt: Any, model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    for ask in (
        lambda: generate(model, byte_tokenizer, prompt, max_tokens=1, config=CHAIN),
        lambda: batch_generate(model, byte_tokenizer, [prompt], max_tokens=1, config=CHAIN),
    ):
        with pytest.raises(SpecStreamError) as refused:
            ask()
        assert is_one_sentence(refused.value)


@pytest.mark.parametrize("prompts", ["abc", None, 5, [1, 2, 3], mx.array([1, 2])], ids=repr)
def test_a_batch_is_a_list_of_prompts(
    prompts: Any, model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    with pytest.raises(SpecStreamError):
        batch_generate(model, byte_tokenizer, prompts, max_tokens=1, config=CHAIN)


def test_numbers_of_other_kinds_are_numbers(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    plain: dict[str, Any] = {"max_tokens": 3, "config": CHAIN, "seed": 3}
    odd = {"max_tokens": np.int64(3), "config": CHAIN, "seed": 3.0, "prefill_step_size": 2.0}
    drawn = SamplingConfig(temp=1.5, top_k=4, top_p=0.5)
    same = SamplingConfig(temp=np.float32(1.5), top_k=np.int32(4), top_p=np.float64(0.5))  # type: ignore[arg-type]
    assert same == drawn
    expected = generate(
        model, byte_tokenizer, PROMPT, sampler=drawn.sampler(256, byte_tokenizer), **plain
    )
    for prompt in (
        tuple(PROMPT),
        np.array(PROMPT),
        mx.array(PROMPT),
        [97.0, np.int64(98)],
        iter(PROMPT),
    ):
        sampler = same.sampler(256, byte_tokenizer)
        found = generate(model, byte_tokenizer, prompt, sampler=sampler, **odd)  # type: ignore[arg-type]
        assert found == expected
    assert SamplingConfig(temp=10**30).temp == 1e30  # beyond the integers that MLX takes
    assert TreeSpec(rows=8.0) == TreeSpec(rows=8)  # type: ignore[arg-type]


def test_a_stop_string_alone_is_one_string(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    text = generate(model, byte_tokenizer, PROMPT, max_tokens=12, config=CHAIN)
    stop = text[5:7]
    stopped = generate(model, byte_tokenizer, PROMPT, max_tokens=12, config=CHAIN, stop=stop)
    assert stopped == text[: text.index(stop)]
