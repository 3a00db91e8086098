"""What a run leaves to look at: a log in JSON lines, and the learning curve as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from ..prompts.lines import json_lines
from ..weights.files import atomic_file

LOG_FILE = "train_log.jsonl"
CURVE_FILE = "learning_curve.png"


class Log:
    """Appends records to the log; on resuming, what came after the saved state is cut off."""

    def __init__(self, folder: Path, keep_bytes: int, write: bool) -> None:
        self.file: IO[bytes] | None = None
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / LOG_FILE).open("ab")
            self.file.truncate(keep_bytes)
            self.file.seek(0, 2)

    def write(self, record: Mapping[str, object]) -> None:
        if self.file is not None:
            self.file.write((json.dumps(record) + "\n").encode())
            self.file.flush()

    @property
    def num_bytes(self) -> int:
        return self.file.tell() if self.file is not None else 0

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def read_log(folder: Path) -> list[dict[str, object]]:
    """Return the records of a run's log."""
    path = folder / LOG_FILE
    if not path.exists():
        return []
    return [record for record, _ in json_lines(path) if isinstance(record, dict)]


def draw_curve(folder: Path) -> Path | None:
    """Draw loss and expected tokens per step over the batches; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = read_log(folder)
    steps = [r for r in records if "loss" in r]
    checks = [r for r in records if "valid" in r]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for key, style in (("marginal", "-"), ("conditioned", "--")):
        rows = [(r["batch"], r[key]) for r in steps if key in r]
        for j in range(len(rows[0][1]) if rows else 0):  # type: ignore[arg-type]
            left.plot(
                [x for x, _ in rows],
                [y[j] for _, y in rows],  # type: ignore[index]
                style,
                color=f"C{j}",
                label=f"stream {j + 1}{' given its parent' if style == '--' else ''}",
                linewidth=1,
            )
    for key, label in (("main", "main"), ("early_exit", "early exit")):
        if points := [(r["batch"], r[key]) for r in steps if key in r]:
            left.plot(*zip(*points, strict=True), "k:", label=label, linewidth=1)
    left.set(xlabel="batches", ylabel="cross-entropy", title="training loss")
    for key in ("marginal_chain", "conditioned_chain"):
        rows = [(r["batch"], r["valid"][key]) for r in checks if key in r["valid"]]  # type: ignore[index,operator]
        if rows:
            label = key.removesuffix("_chain")
            right.plot([x for x, _ in rows], [y for _, y in rows], "o-", label=label)
    exits = [(r["batch"], r["valid"]["exit_top1"][0]) for r in checks if "exit_top1" in r["valid"]]  # type: ignore[index,operator]
    if exits:
        right.plot(*zip(*exits, strict=True), "o-", label="early exit, top-1")
    right.set(xlabel="batches", ylabel="tokens per step", title="chain, held-out texts")
    for axes in (left, right):
        if axes.has_data():
            axes.legend(fontsize="x-small")
    with atomic_file(folder / CURVE_FILE, if_exists="replace") as path:
        figure.savefig(path, dpi=120)
    return folder / CURVE_FILE
