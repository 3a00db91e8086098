"""The learning curve of a run as a picture, from its log: training loss left, held-out chains right.

Logs of both trainers can be drawn. PyTorch's has its own words and counts positions; one file of it
may hold several runs (a count that starts again), which are drawn end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, OptionError
from ..prompts.lines import json_lines
from ..weights.files import atomic_file
from .record import LOG_FILE

CURVE_FILE = "learning_curve.png"
Record = Mapping[str, Any]
TORCH_WORDS = {
    "loss": "marginal",
    "conditioned_loss": "conditioned",
    "main_loss": "main",
    "held_out": "valid",
}


def read_curve(path: Path) -> list[Record]:
    """Return the log's records in MLX's words, each with `x`: batches, or positions over all runs.

    Raises:
        DataError: the file is no training log.
    """
    records: list[Record] = []
    before = last = 0
    try:
        for found, _ in json_lines(path):
            record: Any = found
            if "positions" in record:
                if record["positions"] < last:
                    before += last
                last = record["positions"]
                words = {TORCH_WORDS.get(name, name): value for name, value in record.items()}
                records.append({**words, "x": before + last})
            elif "verdict" not in record:
                records.append({**record, "x": record["batch"]})
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a training log ({error}).") from error
    if not records:
        raise DataError(f"{path} is empty; train first.")
    return [record for record in records if record.get("run") != "pruner"]


def draw(log: Path, picture: Path, title: str = "", dpi: int = 80) -> None:
    """Draw the log; the picture's suffix chooses its format.

    Raises:
        OptionError: matplotlib is not there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("a picture needs matplotlib: pip install matplotlib.") from None
    records = read_curve(log)
    checks = [{**record["valid"], "x": record["x"]} for record in records if "valid" in record]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for key, style in (("marginal", "-"), ("conditioned", "--")):
        rows = [record for record in records if isinstance(record.get(key), list)]
        for j in range(max((len(row[key]) for row in rows), default=0)):
            label = f"stream {j + 1}{' given its parent' if style == '--' else ''}"
            x, y = _line([row for row in rows if len(row[key]) > j], key, j)
            left.plot(x, y, style, color=f"C{j}", label=label, linewidth=1)
    for key, label in (("main", "main"), ("early_exit", "early exit")):
        if rows := [record for record in records if key in record]:
            left.plot(*_line(rows, key), "k:", label=label, linewidth=1)
    counted = "positions" if any("positions" in record for record in records) else "batches"
    left.set(xlabel=counted, ylabel="cross-entropy", title="training loss")
    for key in ("marginal_chain", "conditioned_chain"):
        if rows := [check for check in checks if key in check]:
            label = key.removesuffix("_chain")
            right.plot(*_line(rows, key), "o-", label=label)
    if rows := [check for check in checks if "exit_top1" in check]:
        right.plot(*_line(rows, "exit_top1", 0), "o-", label="early exit, top-1")
    right.set(xlabel=counted, ylabel="tokens per step", title="chain, held-out texts")
    for axes in (left, right):
        if axes.has_data():
            axes.legend(fontsize="x-small")
    figure.suptitle(title, fontsize="medium")
    with atomic_file(picture, if_exists="replace") as path:
        figure.savefig(path, dpi=dpi, format=picture.suffix.removeprefix(".") or "png")


def _line(
    rows: Sequence[Record], key: str, place: int | None = None
) -> tuple[list[float], list[float]]:
    """Return x and the records' values, or those at a place in their lists."""
    values = [row[key] if place is None else row[key][place] for row in rows]
    return [row["x"] for row in rows], values


def draw_own_curve(folder: Path) -> Path | None:
    """Draw the curve of a run beside its log; None without matplotlib."""
    try:
        draw(folder / LOG_FILE, folder / CURVE_FILE, dpi=120)
    except OptionError:
        return None
    return folder / CURVE_FILE
