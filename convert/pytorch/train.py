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
from ...train.options import FIELDS, Adds, TrainOptions, add_option, check_value, flag_of
from . import workers
from .trainer import TorchTrainer


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
    _add(group, "mode", "main_loss", "stream_loss", "gate_start", "pruner_rank")
    group = parser.add_argument_group("shape")
    _add(group, "num_streams", "num_msa_layers", "lora_rank", "lora_alpha", "target_modules")
    _add(group, "conditioner_rank", "conditioner_hidden", "conditioner_tokens", "next_token_rank")
    _own(group, "--embedding-std", 1.0, "scale of the untrained stream embeddings")
    text = "with --start-from: cut its adapters to this rank (singular values), or widen them"
    _own(group, "--resize-rank", 0, text)
    _add(group, "start_scale")
    group = parser.add_argument_group("optimisation")
    _add(group, "iters")
    _own(group, "--max-minutes", 0.0, "budget in minutes; the decay follows the clock")
    _own(group, "--positions", 768, "stream positions of a step")
    _add(group, "position_fraction")
    text = "shared mode: so many texts whose prompts begin alike stand together and share that beginning"
    _own(group, "--group-size", 1, text)
    _add(group, "learning_rate", "embedding_learning_rate")
    _own(group, "--conditioner-lr", 2e-3, "of the conditioner")
    _own(group, "--next-token-lr", 2e-3, "of the map of the next token")
    _add(group, "final_lr", "warmup", "beta2", "clip", "alpha_decay")
    _own(group, "--num-frequent", 4096, "tokens always in the head's subset")
    _own(group, "--num-random", 1024, "sampled others in the head's subset")
    _add(group, "max_seq_length")
    group = parser.add_argument_group("running")
    _add(group, "held_out")
    _own(group, "--eval-fraction", 0.25, "share of their positions measured")
    _own(group, "--eval-seconds", 300.0, "between measurements; 0: at the end alone")
    _own(group, "--save-seconds", 180.0, "between checkpoints")
    floats = ("bfloat16", "float16", "float32")
    group.add_argument("--dtype", default="bfloat16", choices=floats[::2])
    group.add_argument("--save-dtype", default="bfloat16", choices=floats)
    _own(group, "--threads", 0, "CPU threads; 0 leaves PyTorch's choice")
    _add(group, "seed")
    return parser


NAMES = {
    "iters": "steps",
    "learning_rate": "lr",
    "embedding_learning_rate": "embedding_lr",
    "max_seq_length": "max_length",
    "position_fraction": "fraction",
    "main_loss": "main_weight",
    "stream_loss": "stream_weight",
}
"""Options of the common table that have another name here."""

DEFAULTS = {"num_msa_layers": 12, "warmup": 40, "embedding_learning_rate": 4e-2, "pruner_rank": 8}
HELP = {
    "iters": "budget in steps, unless --max-minutes is given",
    "embedding_learning_rate": "of the stream embeddings",
    "max_seq_length": "longer texts are left out",
    "pruner_rank": "with --train pruner",
    "learning_rate": "of the adapters",
    "held_out": "texts kept for measuring",
    "warmup": "steps of linear warm-up",
    "num_msa_layers": "upper layers N_s that run streams",
}


def _add(parser: Adds, *names: str) -> None:
    """Add options of the common table."""
    for name in names:
        own, text = NAMES.get(name, name), HELP.get(name, "")
        default = DEFAULTS.get(name, FIELDS[name].default)
        add_option(parser, name, flag_of(own), text=text, default=default)


def _own(parser: Adds, flag: str, default: float, text: str) -> None:
    """Add an option that only this trainer has."""
    parser.add_argument(flag, type=type(default), default=default, help=f"{text} ({default})")


def options_of(args: argparse.Namespace) -> TrainOptions:
    """Return what the common table has of these options.

    Raises:
        OptionError: a value is out of range.
    """
    own = {name: NAMES.get(name, name) for name in FIELDS}
    values = {name: getattr(args, own[name]) for name in FIELDS if own[name] in args}
    for name, value in values.items():
        check_value(FIELDS[name], value, flag_of(own[name]))
    if args.train == "pruner":
        values["part"] = "pruner"
    else:
        values["pruner_rank"] = 0
    return TrainOptions(**values)


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if args.train == "plain":
        args.mode = "shared"
    if not args.conditioner_rank:
        args.conditioner_hidden = 0
    if not math.isfinite(args.max_minutes) or args.max_minutes < 0:
        raise OptionError(f"--max-minutes must be zero or more, got {args.max_minutes}.")
    options = options_of(args)
    with workers.group():
        TorchTrainer(args, options).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:]), "train"))
