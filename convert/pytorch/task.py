"""Quality of a fine-tuned model on a task with gold answers: decode test prompts greedily and compare.

    python -m mlx_specstream.convert.pytorch.task --model DIR --checkpoint OUT --data sql/test.jsonl --output own.jsonl

Without `--checkpoint` it is the base model; with `--plain` the checkpoint's LoRA without its streams. The answers go to
`--output` in the form that `evaluate.py` reads, the verdicts to `--figures`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...exit_status import exit_status
from ...prompts.lines import json_lines
from ...weights.files import atomic_file, refuse_same_file
from .backbone import TorchBackbone
from .batched import SlotDecoder, answer
from .checkpoint import load_checkpoint
from .distill import read_prompts
from .shared_decoding import SharedDecoder, merge_lora
from .sql_task import judge

QUESTION = "\n\nQuestion:"
"""What stands between schema and question in a prompt of the SQL task."""


def run(args: argparse.Namespace) -> dict[str, object]:
    """Decode and judge; write the answers; return the figures."""
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads or torch.get_num_threads())
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    backbone = TorchBackbone.load(args.model, getattr(torch, args.dtype))
    make = SlotDecoder
    if args.checkpoint:
        adapters = load_checkpoint(args.checkpoint, backbone).requires_grad_(False)
        merge_lora(backbone, adapters)
        if not args.plain:
            make = functools.partial(SharedDecoder, adapters=adapters)  # type: ignore[assignment]
    prompts = read_prompts(Path(args.data), tokenizer, args.max_prompt_tokens)[: args.max_prompts]
    golds: list[Any] = [record for record, _ in json_lines(Path(args.data))]
    counts = {"exact": 0, "runs": 0, "right": 0}
    stop = {"max_new_tokens": args.max_tokens, "eos": {tokenizer.eos_token_id}, "make": make}
    records = []
    for prompt in tqdm(
        answer(backbone, prompts, batch_size=args.batch_size, **stop),
        total=len(prompts),
        unit="prompt",
    ):
        reply = tokenizer.decode(prompt.answer, skip_special_tokens=True)
        gold = golds[prompt.index]
        verdict = judge(gold["prompt"].split(QUESTION)[0], gold["completion"], reply)
        for name in counts:
            counts[name] += getattr(verdict, name)
        records.append(prompt.record(prompt.answer, tokenizer))
    with atomic_file(args.output, if_exists="replace") as path:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path.write_text(text, encoding="utf-8")
    tokens = sum(len(p.answer) for p in prompts)
    shares = {name: round(count / max(1, len(prompts)), 4) for name, count in counts.items()}
    return {"prompts": len(prompts), "tokens": tokens, **shares}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="task", description="A model's SQL against gold queries.")
    parser.add_argument("--model", required=True, help="local Hugging Face model folder")
    parser.add_argument("--checkpoint", help="schema-1 folder of shared mode")
    parser.add_argument("--plain", action="store_true", help="the LoRA alone, without streams")
    parser.add_argument("--data", required=True, help="JSON lines of prompt and completion")
    parser.add_argument("--output", required=True, help="JSON lines of the answers")
    parser.add_argument("--figures", help="JSON file for the figures")
    parser.add_argument("--max-prompts", type=int, help="the first ones only")
    parser.add_argument("--max-prompt-tokens", type=int, default=640)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=0)
    return parser


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    files = {"--data": args.data, "--output": args.output}
    refuse_same_file(files | ({"--figures": args.figures} if args.figures else {}))
    figures = run(args)
    print(json.dumps(figures, indent=1))
    if args.figures:
        with atomic_file(args.figures, if_exists="replace") as path:
            path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:]), "task"))
