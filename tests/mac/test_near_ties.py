"""Speculation on the GPU: answers are plain decoding's, or part where two tokens are nearly as likely.

    python -m pytest tests/mac -m mac      # on a Mac; a divergence's message says how far apart the tokens are

A GPU takes other kernels for one row than for several, so tokens may differ at near-ties, which
`verify.py` judges by plain decoding's own logits. Heads have 64 channels, which Metal's fused
attention takes, and matrices are wide enough for its kernels for quantised weights. What the CPU
runs of it is a smoke test: it shows that these tests can pass, and that they notice a fault.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream import batch_generate, load
from mlx_specstream.config import DecodeConfig
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.probe import check_backbone
from mlx_specstream.speculation.statistics import SpeculationStats
from mlx_specstream.verify import Replayed, compare, replay
from tests.support import tiny
from tests.support.scripted import accept_one_draft, with_streams

MAX_TOKENS = {"gpu": 24, "cpu": 8}
PROMPT = list(b"Why is the sky blue?")
TREES = ("chain", "6", "16", "16:8", "4 inline")


@dataclass(frozen=True)
class Kind:
    """A precision. bits: of quantised weights, 0 for none. group: query heads per key head."""

    dtype: mx.Dtype
    bits: int = 0
    mode: str = "affine"
    group: int = 2


KINDS = {
    "float32": Kind(mx.float32),
    "float16": Kind(mx.float16),
    "bfloat16": Kind(mx.bfloat16),
    "float16, 8 bits": Kind(mx.float16, 8),
    "float16, 4 bits": Kind(mx.float16, 4),
    "bfloat16, mxfp4": Kind(mx.bfloat16, 4, "mxfp4"),
    "eight heads on one": Kind(mx.float16, group=8),
}


def made(kind: Kind) -> StreamModel:
    """Return a model of three layers with random streams, checked as `load` does."""
    model = tiny.tiny_model(
        num_hidden_layers=3,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=kind.group,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=8192,
    )
    model.set_dtype(kind.dtype)
    if kind.bits:
        size = 32 if kind.mode == "mxfp4" else 64
        nn.quantize(model, group_size=size, bits=kind.bits, mode=kind.mode)
    joined = with_streams(model)
    mx.eval(model.parameters(), list(joined.streams.tensors.values()) if joined.streams else [])
    check_backbone(joined.backbone)
    return joined


def assert_same(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    plain: Replayed,
    found: Replayed,
) -> None:
    """Fail unless the tokens are plain decoding's, but for near-ties."""
    comparison = compare(model, tokenizer, prompt, plain, found)
    assert comparison.verdict != "mismatch", comparison.divergence


def replayed(tokens: list[int]) -> Replayed:
    return Replayed(tokens, "", SpeculationStats(), 0.0)


@pytest.mark.parametrize("name", KINDS)
def test_every_tree(name: str, device: str, byte_tokenizer: TokenizerWrapper) -> None:
    model = made(KINDS[name])
    plain = replay(model, byte_tokenizer, PROMPT, MAX_TOKENS[device], None)
    for tree in TREES if device == "gpu" else TREES[-2:]:
        ours = replay(model, byte_tokenizer, PROMPT, MAX_TOKENS[device], DecodeConfig.parse(tree))
        assert_same(model, byte_tokenizer, PROMPT, plain, ours)


@pytest.mark.mac
def test_the_demo_in_float16() -> None:
    """As `--model demo` runs on a GPU, with the shipped streams; fetched if it is not there yet."""
    if not mx.metal.is_available():
        pytest.skip("needs a Mac with Apple silicon")
    before = mx.default_device()
    mx.set_default_device(mx.gpu)
    try:
        model, tokenizer = load("demo")
        assert model.backbone.dtype == mx.float16
        assert model.streams is not None
        assert model.streams.apart
        messages = [{"role": "user", "content": "Why is the sky blue?"}]
        prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        plain = replay(model, tokenizer, prompt, 64, None)
        for tree in TREES[:-1]:  # streams that know the next token are never inline
            ours = replay(model, tokenizer, prompt, 64, DecodeConfig.parse(tree))
            assert_same(model, tokenizer, prompt, plain, ours)
    finally:
        mx.set_default_device(before)


def test_a_fault_is_noticed(
    device: str, byte_tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(KINDS["float16"])
    plain = replay(model, byte_tokenizer, PROMPT, MAX_TOKENS[device], None)
    accept_one_draft(monkeypatch)
    wrong = replay(model, byte_tokenizer, PROMPT, MAX_TOKENS[device], DecodeConfig.parse("chain"))
    assert compare(model, byte_tokenizer, PROMPT, plain, wrong).verdict == "mismatch"


@pytest.mark.parametrize("length", [1020, 4090])
def test_where_the_context_grows_past_a_change_of_kernels(
    length: int, device: str, byte_tokenizer: TokenizerWrapper
) -> None:
    """Metal's attention splits the keys from 1,024 or 4,096 of them on, by chip and heads."""
    model = made(KINDS["float16"])
    prompt = [(7 * i * i + 3 * i) % 250 for i in range(length if device == "gpu" else 40)]
    plain = replay(model, byte_tokenizer, prompt, MAX_TOKENS[device], None)
    for tree in ("chain", "16"):
        ours = replay(model, byte_tokenizer, prompt, MAX_TOKENS[device], DecodeConfig.parse(tree))
        assert_same(model, byte_tokenizer, prompt, plain, ours)


@pytest.mark.parametrize("name", ["float16", "float16, 4 bits"])
def test_several_answers_in_one_pass(
    name: str, device: str, byte_tokenizer: TokenizerWrapper
) -> None:
    model = made(KINDS[name])
    prompts = [list(text) for text in (b"one", b"another prompt", b"a third")]
    batch = batch_generate(
        model, byte_tokenizer, prompts, MAX_TOKENS[device], config=DecodeConfig.parse("chain")
    )
    for prompt, tokens in zip(prompts, batch.token_ids, strict=True):
        plain = replay(model, byte_tokenizer, prompt, MAX_TOKENS[device], None)
        assert_same(model, byte_tokenizer, prompt, plain, replayed(tokens))


@pytest.mark.parametrize("tree", ["chain", "16"])
def test_an_answer_in_another_thread(
    tree: str, device: str, byte_tokenizer: TokenizerWrapper
) -> None:
    model = made(KINDS["float16"])
    plain = replay(model, byte_tokenizer, PROMPT, MAX_TOKENS[device], None)
    config = DecodeConfig.parse(tree)
    here = replay(model, byte_tokenizer, PROMPT, MAX_TOKENS[device], config)
    found: list[Replayed] = []

    def answer() -> None:
        if device == "cpu":  # a new thread begins on the machine's own default device
            mx.set_default_device(mx.cpu)
        found.append(replay(model, byte_tokenizer, PROMPT, MAX_TOKENS[device], config))

    for _ in range(2):
        thread = threading.Thread(target=answer)
        thread.start()
        thread.join()
    assert len(found) == 2
    for ours in (here, *found):
        assert_same(model, byte_tokenizer, PROMPT, plain, ours)
