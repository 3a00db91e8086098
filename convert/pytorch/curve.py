"""The learning curve of a run as a picture, from its log.

    python -m mlx_specstream.convert.pytorch.curve OUT/train_log.jsonl --output curve.png

Left the training loss per stream, given the parent where that is trained; right what the held-out texts give as a
chain. A log may hold several runs one after another: they are drawn end to end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...exit_status import exit_status
from ...train.curve import draw
from ...weights.files import refuse_same_file


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
