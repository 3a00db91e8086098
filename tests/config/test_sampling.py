from __future__ import annotations

import math

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream.config import SamplingConfig
from mlx_specstream.config.sampling import BOUNDS
from mlx_specstream.errors import OptionError


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_kept(name: str) -> None:
    bounds = BOUNDS[name]
    for value in (bounds.low, bounds.high):
        if value is not None:
            SamplingConfig(**{name: value})
    wrong = [math.nan, math.inf]
    wrong += [] if bounds.low is None else [bounds.low - 1]
    wrong += [] if bounds.high is None else [bounds.high + 1]
    for value in wrong:
        with pytest.raises(OptionError, match=f"^{name.replace('_', '-')} must be "):
            SamplingConfig(**{name: value})


@pytest.mark.parametrize(
    "fields", [{"temp": 0.0}, {"temp": 1e-4}, {"temp": 1.0, "top_p": 0}, {"temp": 1.0, "top_k": 1}]
)
def test_what_leaves_one_token_is_greedy(
    fields: dict[str, float], byte_tokenizer: TokenizerWrapper
) -> None:
    assert SamplingConfig(**fields).sampler(256, byte_tokenizer) is None  # type: ignore[arg-type]


def test_what_does_not_fit_the_vocabulary(byte_tokenizer: TokenizerWrapper) -> None:
    with pytest.raises(OptionError, match="top-k must be below the model's 256 tokens, got 256"):
        SamplingConfig(temp=1.0, top_k=256).sampler(256, byte_tokenizer)
    with pytest.raises(OptionError, match="names the token id 256, but the model's ids are 0 to"):
        SamplingConfig(logit_bias={256: 1.0}).processors(256)
    with pytest.raises(OptionError, match="bias must be a number"):
        SamplingConfig(logit_bias={1: math.nan})


def test_seeds_have_64_bits() -> None:
    assert SamplingConfig(seed=2**64 - 1).seed == 2**64 - 1
    with pytest.raises(OptionError, match="seed must be a whole number from 0"):
        SamplingConfig(seed=2**64)
