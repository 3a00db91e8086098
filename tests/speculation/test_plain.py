from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_sampler

from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.drafting import StreamDecoder
from mlx_specstream.speculation.plain import PlainDecoder, plain_decoder
from mlx_specstream.speculation.result import MaxTokens, StepResult
from mlx_specstream.speculation.sampling import TokenSampler
from tests.support.engine import (
    decode,
    examples,
    mlx_lm_tokens,
    random_streams,
    small_model,
    stream_config,
)


@examples(25)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(1, 41),
)
def test_plain_text_is_mlx_lms(
    family: str, layers: int, length: int, seed: int, chunk: int
) -> None:
    model = small_model(family, layers, vocab=64, seed=seed)
    prompt = [int(t) for t in np.random.default_rng(seed).integers(0, 64, length)]
    run = decode(PlainDecoder(Backbone(model), TokenSampler()), prompt, 20, chunk=chunk)
    assert run.tokens == mlx_lm_tokens(model, prompt, 20)
    assert run.cache.length == length - 1 + 20
    assert all(step.drafted == step.accepted == 0 for step in run.steps)
    assert all(step.origins == [0] for step in run.steps)
    assert all(step.logits.shape == (1, 64) for step in run.steps)


def test_mlxs_seed_repeats_a_sampled_text() -> None:
    """Which text a seed gives is ours, not mlx-lm's: a token's numbers depend on its place."""
    model = small_model(vocab=64)
    texts = []
    for seed in (4, 4, 5):
        mx.random.seed(seed)
        decoder = PlainDecoder(Backbone(model), TokenSampler(make_sampler(temp=1.0)))
        texts.append(decode(decoder, [1, 2, 3], 30).tokens)
    assert texts[0] == texts[1] != texts[2]


def test_which_plain_decoding_is_the_reference() -> None:
    model = small_model()
    token_sampler = TokenSampler()
    lossless = random_streams(model, stream_config())
    assert isinstance(plain_decoder(lossless.backbone, lossless, token_sampler), PlainDecoder)
    assert isinstance(plain_decoder(lossless.backbone, None, token_sampler), PlainDecoder)
    shared = random_streams(model, stream_config(mode="shared"))
    decoder = plain_decoder(shared.backbone, shared, token_sampler)
    assert isinstance(decoder, StreamDecoder)
    run = decode(decoder, [1, 2], 5)
    assert [(len(step.tokens), step.drafted) for step in run.steps] == [(1, 0)] * 5


@pytest.mark.parametrize("length", [1, 2, 7])
def test_prefill_reports_progress(length: int) -> None:
    seen: list[tuple[int, int]] = []
    decoder = PlainDecoder(Backbone(small_model()), TokenSampler())
    cache = KVCache(3)
    decoder.prefill([1] * length, cache, lambda done, total: seen.append((done, total)), chunk=3)
    assert seen == [(done, length) for done in [*range(3, length, 3), length]]
    assert cache.length == length


def test_history_is_kept_up() -> None:
    token_sampler = TokenSampler()
    run = decode(PlainDecoder(Backbone(small_model()), token_sampler), [1, 2], 5)
    assert token_sampler.history == [1, 2, *run.tokens]


def test_an_interrupt_leaves_the_cache_at_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the pass ahead is being built: a chat goes on from the same cache."""
    backbone = Backbone(small_model())
    decoder, cache, passes = PlainDecoder(backbone, TokenSampler()), KVCache(3), []
    forward = backbone.forward

    def interrupted(*args: object) -> mx.array:
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt
        return forward(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(backbone, "forward", interrupted)
    text = []
    with pytest.raises(KeyboardInterrupt):
        for result in decoder.steps(1, cache, MaxTokens()):
            text += result.tokens
    assert len(text) == 2
    assert cache.length == 2


def test_a_limit_that_is_reached_before_the_first_token_stops_after_it() -> None:
    criteria = MaxTokens(0)
    assert not criteria.should_continue(StepResult([1], 0, mx.zeros((1, 4))))
    assert MaxTokens(-1).should_continue(StepResult([1], 0, mx.zeros((1, 4))))
