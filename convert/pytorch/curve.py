"""The learning curve of a run as a picture, from its log.

    python -m mlx_specstream.convert.pytorch.curve OUT/train_log.jsonl --output curve.png

Left the training loss per stream, given the parent where that is trained; right what the held-out texts give as a
chain. A log may hold several runs one after another (`run` in its lines, or a step count that starts again): they are
drawn end to end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ...errors import DataError, OptionError
from ...exit_status import exit_status
from ...prompts.lines import json_lines
from ...weights.files import atomic_file, refuse_same_file


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the log's records, each with `trained`: stream positions trained on up to then, over all runs.

    Raises:
        DataError: the file is no training log.
    """
    records: list[dict[str, Any]] = []
    before = last = 0
    try:
        for found, _ in json_lines(path):
            record: Any = found
            if record["positions"] < last:
                before += last
            last = record["positions"]
            records.append({**record, "trained": before + last})
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a training log ({error}).") from error
    if not records:
        raise DataError(f"{path} is empty; train first.")
    return records


def draw(log: Path, picture: Path, title: str = "") -> None:
    """Draw the log; the picture's suffix chooses its format.

    Raises:
        OptionError: matplotlib is not there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("a picture needs matplotlib: pip install matplotlib.") from None
    records = [r for r in read_log(log) if r.get("run") != "pruner"]
    steps = [r for r in records if "held_out" not in r]
    checks = [r for r in records if "held_out" in r and "marginal_chain" in r["held_out"]]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for key, style in (("loss", "-"), ("conditioned_loss", "--")):
        lists = [r for r in steps if isinstance(r.get(key), list)]
        for j in range(max((len(r[key]) for r in lists), default=0)):
            label = f"stream {j + 1}" if style == "-" else None
            rows = [r for r in lists if len(r[key]) > j]
            x, y = [r["trained"] / 1000 for r in rows], [r[key][j] for r in rows]
            left.plot(x, y, style, color=f"C{j}", label=label, linewidth=1)
    if rows := [r for r in steps if "main_loss" in r]:
        x, y = [r["trained"] / 1000 for r in rows], [r["main_loss"] for r in rows]
        left.plot(x, y, "k:", label="main", linewidth=1)
    left.set(
        xlabel="positions trained, thousands", ylabel="cross-entropy (dashed: given the parent)"
    )
    for key, label in (
        ("marginal_chain", "the paper's method"),
        ("conditioned_chain", "conditioned"),
    ):
        rows = [r for r in checks if key in r["held_out"]]
        if rows:
            x, y = [r["trained"] / 1000 for r in rows], [r["held_out"][key] for r in rows]
            right.plot(x, y, "o-", label=label)
    right.set(xlabel="positions trained, thousands", ylabel="tokens per step, chain, held out")
    for axes in (left, right):
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    with atomic_file(picture, if_exists="replace") as path:
        figure.savefig(path, dpi=80, format=picture.suffix.removeprefix(".") or "png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="curve", description="Draw a training log.")
    parser.add_argument("log", type=Path, help="train_log.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--title", default="")
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    refuse_same_file({"the log": args.log, "--output": args.output})
    draw(args.log, args.output, args.title)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:]), "curve"))
