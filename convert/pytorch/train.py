r"""Train streams, or a pruner for them, and write a schema-1 checkpoint.

    # 1. the model's own answers, and its states on the way
    python -m mlx_specstream.convert.pytorch.distill --model DIR --data prompts.jsonl --output own.jsonl --states states
    # 2. streams and parent conditioner, within a time budget; the learning rate has decayed when the time is up
    python -m mlx_specstream.convert.pytorch.train --model DIR --data own.jsonl --states states --output OUT \
        --num-streams 4 --num-msa-layers 12 --max-minutes 60

In lossless mode the base model is frozen and only stream rows are computed and differentiated; `--mode shared`
trains main and streams together (with few `--positions` on small machines), `--train pruner` the early exit alone
(with `--start-from`). What is minimised is in `objectives.py`.

The output is a schema-1 checkpoint plus `train_log.jsonl` and `train_args.json`. While training, `OUT.partial-train/`
holds the state that a second run with the same output continues from, exactly: adapters, optimizer, place in the data.
Without `--states` the base states are computed in every step.

Several processes share a step when started by

    torchrun --nproc-per-node 2 -m mlx_specstream.convert.pytorch.train ... --threads 1

which on a CPU whose cores others use too loses far less than threads that wait for each other.
"""

from __future__ import annotations

import argparse
import math
import sys

from ...errors import OptionError
from ...exit_status import exit_status
from . import workers
from .trainer import Trainer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train", description="Train speculative streams for a frozen model."
    )
    parser.add_argument("--model", required=True, help="local Hugging Face model folder")
    parser.add_argument(
        "--base-name", help="name of the base model written to the checkpoint (default: --model)"
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="JSON-lines files: distilled ids, messages or completions",
    )
    parser.add_argument(
        "--states",
        nargs="+",
        help="base states that distill.py kept (prefixes); texts without them are left out",
    )
    parser.add_argument("--output", required=True, help="checkpoint folder to write")
    parser.add_argument(
        "--start-from",
        help="schema-1 checkpoint to start from; its shape wins, streams may be added",
    )
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--train",
        default="streams",
        choices=("streams", "pruner", "plain"),
        help="plain: next-token LoRA without streams, the yardstick of shared mode",
    )
    group.add_argument("--mode", default="lossless", choices=("lossless", "shared"))
    group.add_argument("--main-weight", type=float, default=1.0, help="α_0, shared mode")
    group.add_argument("--stream-weight", type=float, default=0.1, help="α_j, shared mode")
    group.add_argument(
        "--gate-start",
        type=float,
        default=-6.0,
        help="shared mode: score by which main's attention to its streams begins; zero after 30 %% of the run",
    )
    group.add_argument("--pruner-rank", type=int, default=8, help="with --train pruner")
    group = parser.add_argument_group("shape")
    group.add_argument("--num-streams", type=int, default=4, help="γ")
    group.add_argument("--num-msa-layers", type=int, default=12, help="N_s")
    group.add_argument("--lora-rank", type=int, default=16)
    group.add_argument("--lora-alpha", type=float, default=32.0)
    group.add_argument(
        "--target-modules", nargs="*", help="linear layers that get LoRA (default: all)"
    )
    group.add_argument(
        "--conditioner-rank",
        type=int,
        default=64,
        help="0 leaves the conditioner out (and hidden 0)",
    )
    group.add_argument("--conditioner-hidden", type=int, default=128)
    group.add_argument(
        "--conditioner-tokens",
        type=int,
        default=1,
        choices=(1, 2),
        help="tokens before a candidate that the conditioner sees",
    )
    group.add_argument(
        "--next-token-rank",
        type=int,
        default=0,
        help="streams know the next token from their start on; they then need the deferred schedule",
    )
    group.add_argument(
        "--embedding-std", type=float, default=1.0, help="scale of the untrained stream embeddings"
    )
    group.add_argument(
        "--resize-rank",
        type=int,
        default=0,
        help="with --start-from: cut its adapters to this rank (singular values), or widen them",
    )
    group.add_argument(
        "--start-scale",
        type=float,
        default=0.3,
        help="shared mode from lossless streams: share of their LoRA kept, for main rows must now bear it too",
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--steps", type=int, default=1000, help="budget in steps, unless --max-minutes is given"
    )
    group.add_argument(
        "--max-minutes",
        type=float,
        default=0.0,
        help="budget in minutes; the decay follows the clock",
    )
    group.add_argument("--positions", type=int, default=768, help="stream positions of a step")
    group.add_argument(
        "--fraction", type=float, default=0.5, help="share of a text's positions used per epoch"
    )
    group.add_argument(
        "--group-size",
        type=int,
        default=1,
        help="shared mode: so many texts whose prompts begin alike stand together and share that beginning",
    )
    group.add_argument("--lr", type=float, default=2e-3, help="of the adapters")
    group.add_argument("--embedding-lr", type=float, default=4e-2)
    group.add_argument("--conditioner-lr", type=float, default=2e-3)
    group.add_argument("--next-token-lr", type=float, default=2e-3)
    group.add_argument(
        "--final-lr", type=float, default=0.05, help="share of the learning rate left at the end"
    )
    group.add_argument("--warmup", type=int, default=40, help="steps")
    group.add_argument("--beta2", type=float, default=0.99)
    group.add_argument("--clip", type=float, default=1.0)
    group.add_argument("--alpha-decay", type=float, default=0.8, help="α_j ∝ this to the power j-1")
    group.add_argument(
        "--num-frequent", type=int, default=4096, help="tokens always in the head's subset"
    )
    group.add_argument(
        "--num-random", type=int, default=1024, help="sampled others in the head's subset"
    )
    group.add_argument("--max-length", type=int, default=1024)
    group = parser.add_argument_group("running")
    group.add_argument("--held-out", type=int, default=64, help="texts kept for measuring")
    group.add_argument(
        "--eval-fraction", type=float, default=0.25, help="share of their positions measured"
    )
    group.add_argument("--eval-seconds", type=float, default=300.0)
    group.add_argument("--save-seconds", type=float, default=180.0)
    group.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    group.add_argument(
        "--save-dtype", default="bfloat16", choices=("bfloat16", "float16", "float32")
    )
    group.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice"
    )
    group.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if args.train == "plain":
        args.mode = "shared"
    if not args.conditioner_rank:
        args.conditioner_hidden = 0
    if not math.isfinite(args.max_minutes) or args.max_minutes < 0:
        raise OptionError(f"--max-minutes must be zero or more, got {args.max_minutes}.")
    with workers.group():
        Trainer(args).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:]), "train"))
