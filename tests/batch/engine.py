"""Batched decoding of tiny models, collected request by request, and the same requests alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.sample_utils import make_sampler

from mlx_specstream.batch import BatchDecoder, BatchSequence
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.result import StepResult
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from tests.reference.sampling import chi_square_p
from tests.support.engine import committed_rows, random_streams, stream_config

CHAIN = TreeSpec(kind="chain", branching=1)


def prompt_of(length: int, seed: int, vocab: int = 12) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, length)]


def as_model(streams: Streams) -> StreamModel:
    return StreamModel(streams.backbone.model, streams.backbone, streams, "tiny", "random")


def streamed(model: nn.Module, **fields: object) -> StreamModel:
    return as_model(random_streams(model, stream_config(**fields)))


def batch_decoder(model: StreamModel, schedule: str = "auto", **options: object) -> BatchDecoder:
    return BatchDecoder(model, DecodeConfig(CHAIN, schedule=schedule), **options)  # type: ignore[arg-type]


@dataclass
class Request:
    """A request in a batch, and what came out of it."""

    decoder: BatchDecoder
    prompt: Sequence[int]
    limit: int
    cache: KVCache | None = None
    sampler: Callable[[mx.array], mx.array] | None = None
    processors: Sequence[Callable[[mx.array, mx.array], mx.array]] = ()
    seed: int | None = None
    tokens: list[int] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    error: Exception | None = None
    sequence: BatchSequence = field(init=False)

    def __post_init__(self) -> None:
        self.sequence = self.decoder.add(
            self.prompt, cache=self.cache, token_sampler=self.token_sampler(), criteria=self
        )

    def token_sampler(self) -> TokenSampler:
        return TokenSampler(self.sampler, tuple(self.processors), list(self.prompt), seed=self.seed)

    def should_continue(self, result: StepResult) -> bool:
        self.tokens += result.tokens
        self.results.append(result)
        return len(self.tokens) < self.limit


def step(decoder: BatchDecoder, requests: Sequence[Request]) -> None:
    """Take one step, noting errors, and check that each sequence was told at most once."""
    events = decoder.step()
    assert len({id(event.sequence) for event in events}) == len(events)
    for sequence, result, error in events:
        (request,) = (request for request in requests if request.sequence is sequence)
        assert (result is None) != (error is None)
        if result is not None:
            assert request.results[-1] is result
        request.error = error


def finish(decoder: BatchDecoder, requests: Sequence[Request]) -> int:
    """Step until nothing is left to do and return the number of steps."""
    steps = 0
    while decoder.busy:
        step(decoder, requests)
        steps += 1
        assert steps < 1000
    return steps


def assert_fresh(cache: KVCache, streams: Streams, tokens: Sequence[int]) -> None:
    """Fail unless the committed rows are those of a fresh prefill of `tokens`."""
    assert cache.length == len(tokens)
    fresh = KVCache(len(cache.layers))
    if tokens:
        streams.backbone.forward(mx.array(list(tokens)), fresh)
        fresh.advance(len(tokens))
        for found, expected in zip(committed_rows(cache), committed_rows(fresh), strict=True):
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)


def assert_draws_follow(
    decoder: BatchDecoder, model: StreamModel, prompt: list[int], vocab: int
) -> None:
    """Draw two tokens of 400 requests, eight at a time, and compare the pairs with the model's."""
    sampler = make_sampler(temp=1.0)
    requests: list[Request] = []
    for _ in range(50):
        batch = [
            Request(decoder, prompt, 2, sampler=sampler, seed=len(requests) + n) for n in range(8)
        ]
        finish(decoder, batch)
        requests += batch
    found = Counter((request.tokens[0], request.tokens[1]) for request in requests)
    exact = {}
    for first in range(vocab):
        logits = model.model(mx.array([[*prompt, first]]))[0, -2:]
        before, after = np.array(mx.softmax(logits, axis=-1))
        exact |= {(first, second): float(before[first] * after[second]) for second in range(vocab)}
    assert chi_square_p(found, exact) > 1e-3
    assert sum(result.accepted for r in requests for result in r.results) > 50
