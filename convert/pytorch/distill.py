"""Self-distillation: the base model's own greedy answers to a file of prompts.

Streams learn to foresee what *this* model will say, so their training text is what it says [SS §4.1.2, own data].
Each output line holds token ids (what the trainer reads) and chat messages (what mlx-lm reads):

    {"source": "chat_prompts", "index": 17, "prompt_ids": [...], "answer_ids": [...], "messages": [...]}

The output is appended to; a second run with the same output continues where the first one stopped.

    python -m mlx_specstream.convert.pytorch.distill --model DIR --data chat_prompts.jsonl --output chat.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ...errors import OptionError
from ...exit_status import exit_status
from ...prompts import prompt_of
from ...prompts.lines import json_lines
from ...train.distilled import answered
from ...weights.files import refuse_same_file
from .backbone import TorchBackbone
from .batched import PromptInSlot, answer
from .states import StateShape, StateWriter, state_files


def prompt_text(record: object, where: str) -> str:
    """Return the first user turn of a `prompt` or `messages` record."""
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return str(record["prompt"])
    prompt = prompt_of(record, where)
    return next(str(turn["content"]) for turn in prompt.messages if turn["role"] == "user")


def read_prompts(path: Path, tokenizer: object, max_prompt_tokens: int) -> list[PromptInSlot]:
    """Read a JSON-lines file and apply the tokenizer's chat template; longer prompts are left out."""
    prompts = []
    source = path.stem if path.stem != "train" else path.parent.name
    for index, (record, where) in enumerate(json_lines(path)):
        messages = [{"role": "user", "content": prompt_text(record, where)}]
        ids = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            messages, add_generation_prompt=True, return_dict=False
        )
        if len(ids) <= max_prompt_tokens:
            prompts.append(PromptInSlot(index, messages, None, list(ids), source))
    return prompts


def distill(args: argparse.Namespace) -> None:
    """Answer every prompt of `args.data` that the output does not hold yet."""
    from transformers import AutoTokenizer

    files = {"--data": args.data, "--output": args.output}
    refuse_same_file(files | ({"--states": state_files(args.states)} if args.states else {}))
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    backbone = TorchBackbone.load(args.model, getattr(torch, args.dtype))
    if args.states and not 1 <= args.num_msa_layers <= len(backbone.layers):
        raise OptionError(
            f"--num-msa-layers is {args.num_msa_layers}, and the model has {len(backbone.layers)} "
            "layers; name at least 1 and at most as many."
        )
    output = Path(args.output)
    done = answered(output)
    writer = None
    if args.states:
        shape = (
            args.num_msa_layers,
            backbone.num_kv_heads,
            backbone.head_dim,
            backbone.hidden_size,
            args.dtype,
        )
        writer = StateWriter(args.states, StateShape(*shape))
    for data in map(Path, args.data):
        prompts = read_prompts(data, tokenizer, args.max_prompt_tokens)
        random.Random(args.seed).shuffle(prompts)  # noqa: S311
        if args.max_prompts:
            prompts = prompts[: args.max_prompts]
        prompts = [p for p in prompts if (p.source, p.index) not in done]
        started, tokens = time.monotonic(), 0
        stop = {
            "batch_size": args.batch_size,
            "max_new_tokens": args.max_tokens,
            "eos": {tokenizer.eos_token_id},
        }
        stop["num_msa_layers"] = args.num_msa_layers if writer else 0
        with (
            output.open("a", encoding="utf-8") as file,
            tqdm(total=len(prompts), desc=data.name, unit="prompt", disable=None) as bar,
        ):
            for prompt in answer(backbone, prompts, **stop):
                if writer and prompt.states is not None:
                    writer.append((prompt.source, prompt.index), prompt.states)
                    prompt.states = None
                file.write(
                    json.dumps(prompt.record(prompt.answer, tokenizer), ensure_ascii=False) + "\n"
                )
                file.flush()
                tokens += len(prompt.answer)
                bar.update()
                bar.set_postfix(
                    tokens=tokens, tokens_per_s=f"{tokens / (time.monotonic() - started):.0f}"
                )
        print(
            f"{data}: {len(prompts)} prompts, {tokens} tokens, {time.monotonic() - started:.0f} s",
            flush=True,
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill", description="Write a model's own greedy answers to prompts."
    )
    parser.add_argument("--model", required=True, help="local Hugging Face model folder")
    parser.add_argument(
        "--data", required=True, nargs="+", help="JSON-lines files with 'prompt' or 'messages'"
    )
    parser.add_argument("--output", required=True, help="JSON-lines file to append to")
    parser.add_argument(
        "--states", help="also keep the base states for the trainer here (prefix of two files)"
    )
    parser.add_argument(
        "--num-msa-layers", type=int, default=12, help="layers whose states are kept"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=192, help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--max-prompt-tokens", type=int, default=384, help="leave longer prompts out"
    )
    parser.add_argument(
        "--max-prompts", type=int, default=0, help="prompts taken of each file; 0 means all"
    )
    parser.add_argument("--batch-size", type=int, default=192, help="sequences decoded together")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str]) -> int:
    distill(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:]), "distill"))
