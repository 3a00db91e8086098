"""`specstream convert`: a checkpoint in, an mlx-lm folder with streams out."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from ..errors import OptionError, printable
from ..machine.describe import keep_float32_exact
from ..weights.files import refuse_existing
from .base import DTYPES
from .plan import ConversionPlan, Options
from .quantise import Quantisation

WIDTH = 80
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


def build_parser() -> argparse.ArgumentParser:
    """Return the verb's parser; flags that mlx-lm has keep mlx-lm's names."""
    parser = argparse.ArgumentParser(
        prog="specstream convert",
        description=(
            "Convert a PyTorch, PEFT, safetensors or GGUF checkpoint, with or without streams, or a "
            "published drafter (Medusa, Hydra, EAGLE, EAGLE-3), into an MLX folder. "
            "Nothing in a checkpoint is ever run."
        ),
    )
    add = parser.add_argument
    add(
        "--hf-path",
        "--model",
        required=True,
        metavar="PATH_OR_REPO",
        help="the checkpoint: a folder, a weight file, or a hub repository",
    )
    add("--mlx-path", default="mlx_model", help="the folder to make (default: %(default)s)")
    add(
        "-q", "--quantize", action="store_true", help="quantise the base weights, never the streams"
    )
    add("--q-bits", type=int, help="bits per weight (default: the mode's)")
    add("--q-group-size", type=int, help="weights per scale (default: the mode's)")
    add("--q-mode", choices=MODES, default="affine", help="mlx's quantisation mode")
    add("--quant-predicate", choices=RECIPES, help="mixed bits, mlx-lm's recipes")
    add("--dtype", choices=tuple(DTYPES), help="type of the base weights (default: the config's)")
    add("--upload-repo", metavar="REPO", help="upload the result to this hub repository")
    add("--revision", help="branch, tag or commit of the hub repository")
    ours = parser.add_argument_group("streams")
    ours.add_argument(
        "--base",
        metavar="PATH_OR_REPO",
        help="the base model, if it is not the one the checkpoint names; `demo` is the demo model",
    )
    ours.add_argument(
        "--adapter-only",
        action="store_true",
        help="write the stream files alone, without the base model",
    )
    ours.add_argument(
        "--stream-dtype",
        choices=tuple(DTYPES),
        help="type of the stream weights (default: as they are)",
    )
    ours.add_argument(
        "--merge-lora",
        choices=("lower", "all"),
        nargs="?",
        const="all",
        help="merge shared-mode LoRA into the base: below the MSA layers, or all",
    )
    ours.add_argument(
        "--rules", type=Path, metavar="FILE", help="JSON file of your own name rules, applied first"
    )
    ours.add_argument("--max-shard-mb", type=int, default=5120, help="largest weight file in MB")
    ours.add_argument(
        "--dry-run",
        action="store_true",
        help="print every tensor with its source, shape, type and size, and stop",
    )
    ours.add_argument(
        "--check",
        action="store_true",
        help="prove the result: compare it with PyTorch on probe prompts",
    )
    ours.add_argument(
        "--to-pytorch",
        action="store_true",
        help="the other way: MLX streams to a PyTorch checkpoint (schema 1)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the verb: 0 done, 1 the proof failed; errors of the user's raise SpecStreamError."""
    arguments = build_parser().parse_args(argv)
    target = Path(arguments.mlx_path).expanduser()
    if arguments.check:
        keep_float32_exact()  # the proof tells a mistake from float32's rounding
    if not arguments.dry_run:
        refuse_existing(target)  # now, not after minutes of reading and checking
    if arguments.upload_repo:
        from .hub import check_repository

        check_repository(arguments.upload_repo)
    if arguments.to_pytorch:
        from .reverse import write_pytorch

        write_pytorch(Path(arguments.hf_path), target)
        _say(f"{target} holds the streams as a PyTorch checkpoint (schema 1).")
        return 0
    from .plan import make_plan

    plan = make_plan(options_of(arguments))
    if arguments.check and plan.drafter is not None:
        raise OptionError(
            "--check compares models and their streams; a drafter is converted without."
        )
    for note in plan.notes:
        _say(f"note: {note}.")
    if arguments.dry_run:
        print(describe(plan))
        return 0
    return _convert(plan, target, arguments)


def _say(line: str) -> None:
    print(printable(line))


def options_of(arguments: argparse.Namespace) -> Options:
    """Turn parsed flags into options.

    Raises:
        OptionError: quantisation settings without -q, or numbers out of range.
    """
    settings = (arguments.q_bits, arguments.q_group_size, arguments.quant_predicate)
    if not arguments.quantize and (any(settings) or arguments.q_mode != "affine"):
        raise OptionError("quantisation settings need -q as well.")
    if arguments.max_shard_mb < 1:
        raise OptionError(f"--max-shard-mb must be at least 1, got {arguments.max_shard_mb}.")
    bits, group_size, predicate = settings
    quantisation = Quantisation(bits, group_size, arguments.q_mode, predicate)
    return Options(
        source=arguments.hf_path,
        base=arguments.base,
        revision=arguments.revision,
        dtype=arguments.dtype,
        stream_dtype=arguments.stream_dtype,
        quantisation=quantisation if arguments.quantize else None,
        merge_lora=arguments.merge_lora or "none",
        adapter_only=arguments.adapter_only,
        rules=arguments.rules,
    )


def describe(plan: ConversionPlan) -> str:
    """Return the plan as a table: tensor, type, shape, bytes, operations and origin.

    Where that is wider than a terminal, operations and origin have lines of their own.
    """
    rows = [
        (spec.name, spec.dtype, "x".join(map(str, spec.shape)), f"{spec.nbytes:,}",
         ", ".join(tensor.operations) or "copy", printable(tensor.origin))
        for tensor in plan.tensors()
        for spec in tensor.outputs
    ]  # fmt: skip
    head = ("tensor", "type", "shape", "bytes", "operation", "from")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(6)]
    table = [
        [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in [head, *rows]
    ]
    lines = ["  ".join(row).rstrip() for row in table]
    if max(map(len, lines)) > WIDTH:
        lines = []
        for row in table:
            what, how = ("  ".join(cell.rstrip() for cell in cells) for cells in (row[:4], row[4:]))
            lines += textwrap.wrap(what, WIDTH)
            lines += textwrap.wrap(how, WIDTH, initial_indent="    ", subsequent_indent="      ")
    files = f"files: {', '.join(sorted(plan.files)) or 'none'}"
    return "\n".join([*lines, files, f"{len(rows)} tensors, {plan.num_bytes():,} bytes"])


def _convert(plan: ConversionPlan, target: Path, arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .writer import write_plan

    proof = None
    if arguments.check:
        from .check import Proof

        proof = Proof(plan)
    with tqdm(
        total=plan.num_bytes(), unit="B", unit_scale=True, desc="convert", disable=None
    ) as bar:
        write_plan(
            plan,
            target,
            max_shard_bytes=arguments.max_shard_mb << 20,
            progress=bar.update,
            prove=proof.figures if proof else None,
        )
    _say(f"{target} is complete: {plan.num_bytes() / 1e6:,.1f} MB of weights.")
    if proof:
        print(proof.report())
    if arguments.upload_repo:
        from .hub import upload

        upload(target, arguments.upload_repo)
        _say(f"Uploaded to {arguments.upload_repo}.")
    return 0 if proof is None or proof.passed else 1
