"""The roofline of this machine: how many rows are nearly free, and where computing begins to cost.

A pass reads all weights once, whatever its rows, so rows raise its arithmetic intensity (FLOP per
byte read). Left of the ridge the machine waits for memory and a row more costs little; right of it
every row is paid for in full. Ceilings are measured with products of the model's own dtype.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .methods import parse_streams
from .result import Result
from .summary import ALL, Line, summarised

_WIDTH = {"gpu": 8192, "cpu": 4096}  # of a square matrix that no cache holds
_ROWS = {"gpu": 2048, "cpu": 256}


@dataclass(frozen=True)
class Ceilings:
    """What products of one dtype reach: bytes read per second with one row, FLOP per second."""

    dtype: str
    bytes_s: float
    flop_s: float

    @property
    def ridge(self) -> float:
        """Return the arithmetic intensity at which the two ceilings meet, in FLOP per byte."""
        return self.flop_s / self.bytes_s

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Point:
    """A method on the roofline: FLOP per byte, FLOP per second, and the rows of its passes."""

    method: str
    intensity: float
    flop_s: float
    rows: float


def measure_ceilings(dtype: mx.Dtype, width: int = 0, rows: int = 0) -> Ceilings:
    """Time dependent products with one row and with many; takes some seconds."""
    device = "gpu" if "gpu" in str(mx.default_device()).lower() else "cpu"
    width, rows = width or _WIDTH[device], rows or _ROWS[device]
    # Scaled so that dependent products neither vanish nor overflow.
    weight = (mx.random.uniform(-1, 1, (width, width)) * (3 / width) ** 0.5).astype(dtype)
    mx.eval(weight)
    one = _seconds(mx.ones((1, width), dtype=dtype), weight, 12)
    many = _seconds(mx.ones((rows, width), dtype=dtype), weight, 2)
    name = str(dtype).rpartition(".")[2]
    return Ceilings(name, weight.nbytes / one, 2 * rows * width * width / many)


def _seconds(x: mx.array, weight: mx.array, count: int) -> float:
    """Return seconds per product of a chain of `count`, the best of three."""
    best = float("inf")
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        y = x
        for _ in range(count):
            y = y @ weight.T
        mx.eval(y)
        best = min(best, (time.perf_counter() - started) / count)
    return best


def points(result: Result) -> list[Point]:
    """Return where the methods lie: plain decoding and every setting of the streams."""
    lines = summarised(result)
    whole = ALL if any(line.category == ALL for line in lines) else lines[0].category
    found = []
    for line in lines:
        if line.category == whole:
            point = _point(result, line)
            if point is not None:
                found.append(point)
    return found


def _point(result: Result, line: Line) -> Point | None:
    method, model = result.named_methods[line.method], result.model
    if method.kind == "draft-model":
        return None  # a second model's passes are among the seconds
    runs = [run for asked in result.asked for run in asked.runs if run.method == line.method]
    rows = 1 + sum(run.drafted for run in runs) / max(1, sum(run.passes for run in runs))
    layers, head = model["layer_params"] * model["layers"], model["head_params"]
    flop, read = layers * rows + head * rows, layers + head
    used = model["used"].get(line.method)
    streams = model["streams"].get(Path(parse_streams(used)[0]).name) if used else None
    if streams is not None and line.acceptance:
        share = streams["num_msa_layers"] / model["layers"]
        word, _, count = method.schedule.partition(":")
        inline = word == "inline" or streams["mode"] == "shared"
        nodes = min(rows, int(count or rows)) if inline else 1
        more = nodes * streams["num_streams"]
        flop += more * layers * share + streams["num_streams"] * head
        read += (0 if inline else layers * share) + head
    size = model["weight_bytes"] / model["params"]
    return Point(line.method, 2 * flop / (read * size), 2 * flop / line.step_s, rows)
