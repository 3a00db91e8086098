"""Chunks of a prompt: paced for whoever waits, and never where pace would change an answer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_specstream.config import CacheConfig
from mlx_specstream.model import prefill as prefill_module
from mlx_specstream.model.cache import KVCache
from mlx_specstream.model.prefill import FEWEST_ROWS, PacedChunks, prefill_chunks
from tests.support.scripted import assert_holds, with_streams


class Clock:
    """A clock that goes on by what every chunk takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(prefill_module, "time", clock)
    return clock


def chunks(cache: KVCache, pace: PacedChunks, clock: Clock, rate: float, tokens: int) -> list[int]:
    """Return the chunk sizes of a prompt on a machine that reads `rate` tokens a second."""
    sizes: list[int] = []

    def forward(part: mx.array, _: KVCache) -> mx.array:
        sizes.append(part.shape[0])
        clock.now += part.shape[0] / rate
        return part

    list(prefill_chunks(forward, [1] * tokens, cache, pace))
    return sizes


class Rows:
    """A cache that counts."""

    next_is_generated = False
    arrays: tuple[mx.array, ...] = ()

    def __init__(self, *, depends_on_passes: bool = False) -> None:
        self.depends_on_passes = depends_on_passes
        self.length = 0

    def advance(self, count: int) -> None:
        self.length += count


@pytest.mark.parametrize("rate", [20.0, 100.0, 1000.0, 10**6])
def test_chunks_fit_the_pace_of_the_machine(clock: Clock, rate: float) -> None:
    cache: Any = Rows()
    pace = PacedChunks(512)
    sizes = chunks(cache, pace, clock, rate, 5000)
    assert cache.length == 5000
    settled = sizes[3:-1]
    assert len(set(settled)) == 1, sizes
    assert max(settled) / rate < 1 or settled[0] == FEWEST_ROWS
    assert settled[0] == min(512, max(FEWEST_ROWS, 2 ** int(rate * 0.3).bit_length() // 2))
    # The next prompt begins with what the last one taught.
    assert chunks(cache, pace, clock, rate, 1200)[0] == settled[0]


def test_a_short_chunk_teaches_nothing(clock: Clock) -> None:
    pace = PacedChunks(512, 256)
    chunks(Rows(), pace, clock, 1e-3, 3)  # type: ignore[arg-type]
    assert pace.size == 256


def test_pace_never_changes_rows_that_depend_on_passes(clock: Clock) -> None:
    cache: Any = Rows(depends_on_passes=True)
    assert chunks(cache, PacedChunks(512), clock, 10.0, 1100) == [512, 512, 76]


def test_paced_rows_are_those_of_one_pass(tiny_llama: nn.Module) -> None:
    model = with_streams(tiny_llama)
    tokens = list(range(1, 150))
    cache = model.backbone.new_cache(CacheConfig())
    done = list(prefill_chunks(model.backbone.forward, tokens, cache, PacedChunks(512, 16)))
    assert (done[0], done[-1]) == (16, len(tokens))
    assert_holds(cache, model, tokens)
