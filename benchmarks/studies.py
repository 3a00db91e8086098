"""Studies of what a step costs: which points are measured as context, tree, γ, N_s ... grow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.steps import WARM_UP, plain_seconds, step_cost
from mlx_specstream.bench.session import duration
from mlx_specstream.config import DecodeConfig, Schedule, TreeSpec
from mlx_specstream.doctor.sizes import Shape, usable_bytes
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.machine import Machine
from mlx_specstream.speculation.streams import Streams
from tests.support.random_models import random_model, random_streams

DEMO = Shape("135M", 30, 576, 1536, 9, 3, 64, 49152, True)
TINY = Shape("tiny", 4, 64, 128, 4, 2, 16, 512, True)
SIZES = (
    Shape("0.5B", 24, 896, 4864, 14, 2, 64, 151936, True),
    Shape("1B", 16, 2048, 8192, 32, 8, 64, 128256, True),
    Shape("3B", 28, 3072, 8192, 24, 8, 128, 128256, True),
    Shape("8B", 32, 4096, 14336, 32, 8, 128, 128256),
)
CONTEXTS = (256, 1024, 2048, 4096, 8192)
ROWS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
TREES = ("chain", "8", "16")
SCHEDULES: tuple[Schedule, ...] = ("deferred", "inline")
STEP_STUDIES = ("context", "tree", "streams", "msa", "vocab", "size")


@dataclass(frozen=True)
class Point:
    """One measurement to be made: a value of what grows, in one of several series.

    streams: makes the model with its streams, once for points that share `group`. weight: how
    many plain steps one of its steps is taken for in estimates.
    """

    value: float
    series: str
    group: str
    streams: Callable[[], Streams]
    config: DecodeConfig
    context: int = 256

    @property
    def weight(self) -> float:
        """Return about how many plain steps of this model one step costs."""
        rows = self.config.tree.num_nodes(4)
        return 1.5 + rows * (0.5 if self.config.schedule == "inline" else 0.2)


@dataclass
class Study:
    """A study: what grows, and where it is measured."""

    name: str
    grows: str
    points: list[Point] = field(default_factory=list)


def studies(names: Sequence[str], base: Callable[[], Streams], small: bool) -> Iterator[Study]:
    """Return the studies of step times; `small` ones are quick and only show that they work.

    base: the model whose context, tree, γ and N_s grow.
    """
    shape = TINY if small else DEMO
    layers = shape.layers
    contexts = (64, 128) if small else CONTEXTS
    rows = (2, 4, 8) if small else ROWS
    for name in names:
        if name == "context":
            points = [
                Point(c, f"tree {tree}", "base", base, config(tree), c)
                for c in contexts
                for tree in TREES
            ]
            yield Study(name, "tokens of context", points)
        elif name == "tree":
            points = [
                Point(n, schedule, "base", base, config(str(n), schedule))
                for n in rows
                for schedule in SCHEDULES
            ]
            yield Study(name, "rows of the tree", points)
        elif name == "streams":
            counts = (1, 2) if small else (1, 2, 4, 6, 8)
            points = [
                Point(
                    g, f"tree {tree}", f"γ {g}", made(shape, 32, g, layers * 2 // 5), config(tree)
                )
                for g in counts
                for tree in ("chain", "16")
            ]
            yield Study(name, "streams (γ)", points)
        elif name == "msa":
            msa = (1, 2) if small else (1, 2, 4, 8, 12, 16, 20)
            points = [
                Point(n, schedule, f"N_s {n}", made(shape, 32, 4, n), config("16", schedule))
                for n in msa
                for schedule in SCHEDULES
            ]
            yield Study(name, "MSA layers (N_s)", points)
        elif name == "vocab":
            sizes = (512, 1024) if small else (8192, 32768, 49152, 131072, 262144)
            points = [
                Point(v, f"tree {tree}", f"V {v}", made(replace(shape, vocab=v), 32, 4, layers * 2 // 5), config(tree))
                for v in sizes
                for tree in TREES
            ]  # fmt: skip
            yield Study(name, "tokens in the vocabulary", points)
        elif name == "size":
            yield Study(name, "weights, in billions", size_points(small))


def size_points(small: bool) -> list[Point]:
    """Return models of 0.5 to 8 billion weights, in the precisions that memory allows."""
    machine = Machine.read()
    room = usable_bytes(machine) or 16 << 30
    shapes = (TINY, replace(TINY, name="tiny 2", layers=6)) if small else SIZES
    found = []
    for bits in (32, 4) if machine.backend == "cpu" else (4, 16):  # MLX has no fast 16 on a CPU
        for shape in shapes:
            if shape.needed_bytes(bits, 1024) > room:
                say(f"left out: {shape.name} in {bits} bits does not fit into memory")
                continue
            group = f"{shape.name} in {bits} bits"
            maker = made(shape, bits, 4, max(1, shape.layers // 5))
            found += [
                Point(
                    shape.num_params / 1e9, f"{bits} bits, tree {tree}", group, maker, config(tree)
                )
                for tree in TREES
            ]
    return found


def config(tree: str, schedule: Schedule = "deferred") -> DecodeConfig:
    """Return a setting."""
    return DecodeConfig(TreeSpec.parse(tree), schedule=schedule)


def made(shape: Shape, bits: int, num_streams: int, num_msa_layers: int) -> Callable[[], Streams]:
    """Return what makes a random model with random streams."""

    def make() -> Streams:
        model = StreamModel.plain(random_model(shape, bits))
        return random_streams(model.backbone, num_streams, num_msa_layers, conditioned=True)

    return make


def run_study(study: Study, rounds: int, limit_s: float) -> Iterator[dict[str, Any]]:
    """Measure a study's points, saying how long it takes; leave out those beyond the limit.

    The first plain step of each model tells how long its points take.
    """
    group, streams, plain_s = "", None, 0.0
    begun = time.perf_counter()
    for place, point in enumerate(study.points):
        if point.group != group or streams is None:
            streams, group = None, point.group  # the old model must go before the new one comes
            streams = point.streams()
            plain_s = plain_seconds(streams, point.context)
        estimate = plain_s * (1 + point.weight) * (rounds + WARM_UP)
        left = plain_s * sum((1 + p.weight) * (rounds + WARM_UP) for p in study.points[place:])
        say(
            f"{study.name}: {place + 1}/{len(study.points)}, {study.grows} {point.value:g}, "
            f"{point.series}: about {duration(estimate)}; the study about {duration(left)} more"
        )
        if time.perf_counter() - begun + estimate > limit_s:
            say(f"{study.name}: left out, for it would take longer than {duration(limit_s)}")
            yield {"x": point.value, "series": point.series, "left_out": True}
            continue
        cost = step_cost(streams, point.config, point.context, rounds)
        yield {
            "x": point.value,
            "series": point.series,
            "context": point.context,
            "step_ms": [1e3 * s for s in (cost.step.low, cost.step.median, cost.step.high)],
            "plain_ms": [1e3 * s for s in (cost.plain.low, cost.plain.median, cost.plain.high)],
            "ratio": cost.ratio,
        }


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)
