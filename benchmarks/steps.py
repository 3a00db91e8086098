"""What a step costs: speculative steps of one setting and plain ones, in turns, after a context."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import mlx.core as mx

from mlx_specstream.bench.summary import Spread
from mlx_specstream.config import DecodeConfig
from mlx_specstream.speculation.drafting import StreamDecoder
from mlx_specstream.speculation.plain import PlainDecoder
from mlx_specstream.speculation.result import MaxTokens
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from tests.support.random_models import filled_cache

WARM_UP = 3


@dataclass(frozen=True)
class StepCost:
    """Seconds of a speculative and of a plain step: median and quartiles, and their ratio."""

    step: Spread
    plain: Spread

    @property
    def ratio(self) -> float:
        """Return a step's price in plain steps: it must yield more tokens than that to gain."""
        return self.step.median / self.plain.median


def step_cost(streams: Streams, config: DecodeConfig, context: int, rounds: int) -> StepCost:
    """Time `rounds` dependent steps of either kind after `context` tokens, warmed up, in turns.

    The context is made of random keys and values, which cost what real ones do.
    """
    backbone = streams.backbone
    speculative = StreamDecoder(streams, config, TokenSampler())
    plain = PlainDecoder(backbone, TokenSampler())
    loops = [
        decoder.steps(1, filled_cache(backbone, context), MaxTokens())
        for decoder in (speculative, plain)
    ]
    times: list[list[float]] = [[], []]
    for turn in range(rounds + WARM_UP):
        for place, loop in enumerate(loops):
            started = time.perf_counter()
            next(loop)
            mx.synchronize()  # the loops run one step ahead; each is to pay for its own
            if turn >= WARM_UP:
                times[place].append(time.perf_counter() - started)
    return StepCost(Spread.of(times[0]), Spread.of(times[1]))


def plain_seconds(streams: Streams, context: int) -> float:
    """Return about how long a plain step takes: the fastest of three."""
    plain = PlainDecoder(streams.backbone, TokenSampler())
    loop = plain.steps(1, filled_cache(streams.backbone, context), MaxTokens())
    times = []
    for _ in range(4):
        started = time.perf_counter()
        next(loop)
        mx.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
