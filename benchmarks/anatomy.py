"""The anatomy of a step: where its time goes, beside mlx-lm's own decoding of the same weights.

Three things are timed in turn, round after round: the whole step as decoding runs it; its forward
passes alone (the same rows through the same layers and heads, nothing drafted, accepted or
committed); and one token of mlx-lm's generator. What a step takes beyond its forward passes is ours
to keep small. It is a small difference of large numbers, so it is taken within each round, where a
slow moment hits both, and every other round runs backwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream

from mlx_specstream.config import DecodeConfig
from mlx_specstream.errors import StreamsError
from mlx_specstream.exit_status import exit_status
from mlx_specstream.loading.load import load
from mlx_specstream.model.cache import KVCache, as_mlx_lm
from mlx_specstream.model.prefill import PREFILL_CHUNK, prefill
from mlx_specstream.speculation.drafters import StreamDrafter
from mlx_specstream.speculation.drafting import StreamDecoder
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.speculation.tree import root_only


@dataclass(frozen=True)
class Anatomy:
    """Median milliseconds of one step and its parts, with the rows each phase computes.

    `build_ms` is the Python side of a step, building its graph; `outside_ms` what the step takes
    beyond its forward passes, the median over rounds. A spread is the distance of the quartiles.
    """

    tree: str
    schedule: str
    lower_rows: int
    upper_rows: int
    head_rows: int
    step_ms: float
    step_spread_ms: float
    forward_ms: float
    outside_ms: float
    outside_spread_ms: float
    build_ms: float
    mlx_lm_ms: float
    in_tokens: float

    @property
    def outside(self) -> float:
        """Return the share of a step spent outside its forward passes."""
        return self.outside_ms / self.step_ms


def measure(
    streams: Streams, config: DecodeConfig, read: KVCache, last: int, rounds: int
) -> Anatomy:
    """Time `rounds` steps after the prompt `read` and its `last` token, the parts interleaved.

    The measured tree is a full one: the second step's, drafted by the first.
    """
    decoder = StreamDecoder(streams, config, TokenSampler())
    stepper, cache = decoder.stepper, read.copy(read.length)
    drafter = stepper.drafter
    assert isinstance(drafter, StreamDrafter)
    first = stepper.step(root_only(mx.array([last])), cache)
    decoder.finish(first, cache)
    tree = first.next_tree
    mx.eval(tree.arrays)

    plain = generate_step(
        mx.array([last]), streams.backbone.model, max_tokens=-1, prompt_cache=as_mlx_lm(read)
    )
    builds: list[float] = []

    def step() -> None:
        begin = time.perf_counter()
        work = stepper.step(tree, cache)
        builds.append(time.perf_counter() - begin)
        work.schedule()
        work.read()
        mx.eval(work.logits, *work.next_tree.arrays)

    def forward() -> None:
        head, norm = streams.backbone.head, streams.backbone.norm
        verified = drafter.verify(tree, cache)
        logits = head(verified.last)
        # Whose streams run is known after the head. With a constant in its place (which the argmax
        # of one value is as well) MLX runs both passes layer by layer together and finds weights
        # in the processor's cache, which no step can.
        node = 0 * mx.argmax(logits[0, 0, :2])
        root = mx.argmax(logits[0, 0])
        stream_states = drafter.stream_states(verified, node, root, cache)
        mx.eval(logits, head(norm(stream_states)))

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
        order = list(runs.items())
        for name, run in order if turn % 2 else reversed(order):
            begin = time.perf_counter()
            run()
            if turn >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - begin)
    T, G = tree.num_nodes, streams.num_streams
    m = T if config.prune is None else min(T, config.prune.keep)
    with_streams = min(m, config.stream_nodes or m) if drafter.inline else 1
    outside = [a - b for a, b in zip(times["step"], times["forward"], strict=True)]
    in_tokens = [a / b for a, b in zip(times["step"], times["mlx_lm"], strict=True)]
    return Anatomy(
        tree=str(config.tree) + (f" → {m}" if m < T else ""),
        schedule=("inline" if drafter.inline else "deferred")
        + (f":{config.stream_nodes}" if config.stream_nodes else ""),
        lower_rows=T,
        upper_rows=m + with_streams * G,
        head_rows=m + G,
        step_ms=1e3 * statistics.median(times["step"]),
        step_spread_ms=1e3 * _spread(times["step"]),
        forward_ms=1e3 * statistics.median(times["forward"]),
        outside_ms=1e3 * statistics.median(outside),
        outside_spread_ms=1e3 * _spread(outside),
        build_ms=1e3 * statistics.median(builds[2:]),
        mlx_lm_ms=1e3 * statistics.median(times["mlx_lm"]),
        in_tokens=statistics.median(in_tokens),
    )


def _spread(values: Sequence[float]) -> float:
    """Return the distance between the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


COLUMNS = (
    "| tree | streams | rows: lower / upper / head | step | forward | outside | of it: graph | "
    "in mlx-lm tokens |\n|---|---|---|---|---|---|---|---|"
)


def as_row(found: Anatomy) -> str:
    """Return a line of the Markdown table under `COLUMNS`."""
    rows = f"{found.lower_rows} / {found.upper_rows} / {found.head_rows}"
    return (
        f"| {found.tree} | {found.schedule} | {rows} | {found.step_ms:.1f} ± "
        f"{found.step_spread_ms / 2:.1f} ms | {found.forward_ms:.1f} ms | {found.outside_ms:.1f} ± "
        f"{found.outside_spread_ms / 2:.1f} ms, {found.outside:.1%} | {found.build_ms:.1f} ms | "
        f"{found.in_tokens:.2f} |"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the options of `python -m benchmarks.anatomy`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anatomy")
    parser.add_argument("--model", default="demo", help="model folder, hub id, or 'demo'")
    parser.add_argument("--streams", default="auto", help="stream folder, hub id or shipped name")
    parser.add_argument(
        "--tree", action="append", help="tree to measure, repeatable (default: chain, 8, 16)"
    )
    parser.add_argument(
        "--schedule", default="deferred,inline", help="comma-separated; inline:2 is one as well"
    )
    parser.add_argument("--prune", type=int, help="let the pruner keep this many rows")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="committed text, in tokens")
    parser.add_argument("--rounds", type=int, default=25, help="measured rounds per setting")
    parser.add_argument("--json", action="store_true", help="print one JSON object per setting")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each tree under each schedule and print a Markdown table."""
    args = build_parser().parse_args(argv)
    model, _ = load(args.model, streams=args.streams)
    if model.streams is None:
        raise StreamsError(f"there are no streams for {args.model}; name some with --streams.")
    vocab = model.backbone.vocab_size
    prompt = [(7 * i * i + 3 * i) % min(vocab, 997) for i in range(args.prompt_tokens)]
    read = KVCache(model.backbone.num_layers)
    # Once for all settings: a long prompt takes minutes.
    prefill(model.streams.forward, prompt[:-1], read, None, PREFILL_CHUNK)
    if not args.json:
        print(COLUMNS)
    for tree in args.tree or ["chain", "8", "16"]:
        for schedule in args.schedule.split(","):
            prune = None if args.prune is None else str(args.prune)
            config = DecodeConfig.of_words(tree, prune=prune, schedule=schedule)
            found = measure(model.streams, config, read, prompt[-1], args.rounds)
            text = json.dumps(asdict(found)) if args.json else as_row(found)
            print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, "anatomy"))
