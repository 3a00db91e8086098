"""The fixtures themselves: what other tests rest on."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tests.support import tiny


def test_weights_depend_on_the_seed_alone() -> None:
    ids = mx.array([[1, 2, 3]])
    first, second = tiny.tiny_model(seed=3)(ids), tiny.tiny_model(seed=3)(ids)
    assert mx.array_equal(first, second)
    assert not mx.allclose(first, tiny.tiny_model(seed=4)(ids))


def test_logits_are_spread(tiny_family: nn.Module) -> None:
    logits = np.array(tiny_family(mx.arange(16)[None]))
    top = np.sort(logits, axis=-1)[..., -2:]
    assert logits.dtype == np.float32
    assert 0.5 < logits.std() < 10
    assert (top[..., 1] - top[..., 0]).min() > 1e-4


@pytest.mark.parametrize("text", ["", "plain", " two  spaces\n\n1. x", "naïve 😀 \t{}"])
def test_ids_are_bytes_and_back(byte_tokenizer: TokenizerWrapper, text: str) -> None:
    ids = byte_tokenizer.encode(text)
    assert ids == list(text.encode())
    assert byte_tokenizer.decode(ids) == text


def test_chat_template(byte_tokenizer: TokenizerWrapper) -> None:
    ids = byte_tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True
    )
    assert ids == [tiny.USER, *b"hi", tiny.EOS, tiny.ASSISTANT]
    assert byte_tokenizer.eos_token_ids == {tiny.EOS}


def test_folder_loads_in_mlx_lm(tiny_folder: Path, tiny_llama: nn.Module) -> None:
    model, tokenizer = mlx_lm.load(str(tiny_folder))
    ids = mx.array([tokenizer.encode("hello")])
    assert mx.array_equal(model(ids), tiny_llama(ids))
