"""The anatomy of a step: where its time goes, beside mlx-lm's own decoding of the same weights.

Three things are timed in turn, round after round, so that a slow moment hits all of them alike:
the whole step as decoding runs it; its forward passes alone (the same rows through the same
layers and heads, nothing drafted, accepted or committed); and one token of mlx-lm's generator.
What a step takes beyond its forward passes is ours to keep small.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream

from mlx_specstream.cache import KVCache
from mlx_specstream.config import DecodeConfig
from mlx_specstream.decode import StreamDecoder
from mlx_specstream.sampling import TokenChooser
from mlx_specstream.streams import Streams
from mlx_specstream.tree import root_only


@dataclass(frozen=True)
class Anatomy:
    """Median milliseconds of one step and its parts, with the rows each phase computes.

    `build_ms` is the Python side of a step, building its graph; `outside` is the share of the
    step that is not forward pass.
    """

    tree: str
    schedule: str
    lower_rows: int
    upper_rows: int
    head_rows: int
    step_ms: float
    step_spread_ms: float
    forward_ms: float
    build_ms: float
    mlx_lm_ms: float

    @property
    def outside(self) -> float:
        """Return the share of a step spent outside its forward passes."""
        return max(0.0, 1 - self.forward_ms / self.step_ms)


def measure(streams: Streams, config: DecodeConfig, prompt: Sequence[int], rounds: int) -> Anatomy:
    """Time `rounds` steps after `prompt`, the parts interleaved.

    The measured tree is a full one: the second step's, drafted by the first.
    """
    decoder = StreamDecoder(streams, config, TokenChooser())
    stepper, cache = decoder.stepper, KVCache(streams.backbone.num_layers)
    decoder.prefill(prompt[:-1], cache)
    first = stepper.step(root_only(mx.array([prompt[-1]])), cache)
    decoder.finish(first, cache)
    tree = first.next_tree
    mx.eval(tree.arrays)

    plain = generate_step(mx.array(list(prompt)), streams.backbone.model, max_tokens=-1)
    builds: list[float] = []

    def step() -> None:
        begin = time.perf_counter()
        work = stepper.step(tree, cache)
        builds.append(time.perf_counter() - begin)
        work.schedule()
        mx.eval(work.report, work.logits, *work.next_tree.arrays)

    def forward() -> None:
        head, norm = streams.backbone.head, streams.backbone.norm
        verified = stepper.verify(tree, cache)
        stream_states = stepper.stream_states(verified, mx.array(0), cache)
        mx.eval(head(verified.last), head(norm(stream_states)))

    def token() -> None:
        next(plain)
        # It has scheduled one token more; wait, so that nobody else pays for it.
        mx.synchronize(generation_stream)

    runs: dict[str, Callable[[], object]] = {
        "step": step,
        "forward": forward,
        "mlx_lm": token,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - begin)
    T, G = tree.num_nodes, streams.num_streams
    quartiles = statistics.quantiles(times["step"], n=4)
    return Anatomy(
        tree=str(config.tree),
        schedule="inline" if stepper.inline else "deferred",
        lower_rows=T,
        upper_rows=T * (1 + G) if stepper.inline else T + G,
        head_rows=T + G,
        step_ms=1e3 * statistics.median(times["step"]),
        step_spread_ms=1e3 * (quartiles[2] - quartiles[0]),
        forward_ms=1e3 * statistics.median(times["forward"]),
        build_ms=1e3 * statistics.median(builds),
        mlx_lm_ms=1e3 * statistics.median(times["mlx_lm"]),
    )
