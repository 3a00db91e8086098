"""`specstream distill`: the model's own answers to a file of prompts, to train its streams on.

Streams learn to foresee what *this* model says, so their best training text is what it says. The
output is mlx-lm's chat format, with the exact token ids beside the text (`train/distilled.py`).

Answers are written as they are finished; a run that was stopped continues where it was, and a
line that was cut off by a kill is made again. What a prompt is answered at a temperature depends
on the seed and the prompt, not on the order or on what else is in the batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ..batch.generation import BatchAnswer, batch_generate
from ..config import SamplingConfig
from ..errors import DataError, OptionError, OutputError
from ..loading.load import StreamModel, load
from ..prompts import Prompt as ChatPrompt
from ..prompts import encode_prompt
from ..train.builtin_prompts import BUILTIN, builtin_records
from ..train.data import Record, read_records
from ..train.distilled import PromptToAnswer, answered, in_order
from ..weights.files import refuse_same_file

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

SORT_WINDOW = 1024
"""Prompts are sorted by length inside windows of this size."""


def records_of(source: str, split: str) -> list[Record]:
    """Return the records of a file in any of mlx-lm's formats, or the built-in ones."""
    own = source == BUILTIN and not Path(source).exists()
    return builtin_records() if own else read_records(source, split, need_answer=False)


def read_prompts(
    records: Sequence[Record], tokenizer: Any, max_length: int
) -> tuple[list[PromptToAnswer], int]:
    """Return the prompts of records, and how many were too long.

    A chat is answered at its last user turn; `{"prompt": ...}` alone will do. A tokenizer without
    a chat template, which a model has that was never taught to chat, takes the bare text.

    Raises:
        DataError: unreadable data, or a record without a user's turn.
    """
    prompts, too_long = [], 0
    for index, record in enumerate(records):
        fields = record.fields
        messages = fields.get("messages") or [
            {"role": "user", "content": fields.get("prompt", fields.get("text"))}
        ]
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        if last < 0:
            raise DataError(f"{record.where} has no message of the user to answer.")
        messages, tools = messages[: last + 1], fields.get("tools")
        asked = ChatPrompt(tuple(messages), tools=tuple(tools or ()))
        try:
            tokens = encode_prompt(tokenizer, asked)
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from error
        if len(tokens) > max_length:
            too_long += 1
            continue
        prompts.append(PromptToAnswer(index, messages, tools, tokens))
    return prompts, too_long


def seed_of(seed: int, index: int) -> int:
    """Return the seed of one answer: the same whatever else is answered with it."""
    return int(np.random.SeedSequence([seed & 0xFFFFFFFF, index]).generate_state(1)[0])


def answer_prompts(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompts: Iterable[PromptToAnswer],
    output: Path,
    *,
    max_tokens: int,
    batch_size: int = 32,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    on_record: Callable[[dict[str, Any]], None] = lambda _: None,
    is_over: Callable[[int], bool] | None = None,
) -> None:
    """Append the model's answers to a file as they end.

    on_record: told of every record written; what it raises ends the work. is_over: asked before
    every pass, told how many tokens there are; once it says yes, answers under way are written as far
    as they are.

    Raises:
        OutputError: the file cannot be written; what was finished is kept.
    """
    left = list(prompts)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8") as file:

            def write(number: int, answer: BatchAnswer) -> None:
                record = left[number].record(answer.token_ids, tokenizer)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                on_record(record)

            batch_generate(
                model,
                tokenizer,
                [prompt.tokens for prompt in left],
                max_tokens,
                sampler=(sampling or SamplingConfig()).sampler(
                    model.backbone.vocab_size, tokenizer
                ),
                seed=[seed_of(seed, prompt.index) for prompt in left],
                speculative=False,
                completion_batch_size=batch_size,
                on_answer=write,
                is_over=is_over,
            )
    except OSError as error:
        raise OutputError(
            f"{output} cannot be written ({error.strerror or error}); what was finished is kept, "
            "give the same command again to continue."
        ) from error


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specstream distill", description="Write a model's own answers to prompts."
    )
    parser.add_argument("--model", required=True, help="folder or hub id of the model, or demo")
    parser.add_argument(
        "--data",
        required=True,
        help="prompts: .jsonl, a folder, a hub data set, or 'starter' for 200 built-in ones",
    )
    parser.add_argument("--split", default="train", choices=("train", "valid", "test"))
    parser.add_argument("--output", required=True, help=".jsonl file to write, or to continue")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (%(default)s)")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024, help="leave longer ones out")
    parser.add_argument("--num-prompts", type=int, default=0, help="answer the first n; 0: all")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="answers at a time (%(default)s)"
    )
    parser.add_argument("--temp", type=float, default=0.0, help="0: greedy (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.0, help="0: off (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse values that make no sense.

    Raises:
        OptionError: which one.
    """
    for name, low in (("max_tokens", 1), ("max_prompt_tokens", 1), ("batch_size", 1),
                      ("num_prompts", 0), ("temp", 0), ("top_p", 0)):  # fmt: skip
        if not getattr(args, name) >= low:
            flag = "--" + name.replace("_", "-")
            raise OptionError(f"{flag} must be at least {low}, got {getattr(args, name)}.")
    if args.top_p > 1:
        raise OptionError(f"--top-p is a probability, got {args.top_p}.")


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    check(args)
    refuse_same_file({"--data": args.data, "--output": args.output})
    output = Path(args.output).expanduser()
    done = {index for _, index in answered(output)}
    model, tokenizer = load(args.model, streams=None)
    room = (model.context_length or args.max_prompt_tokens + args.max_tokens) - args.max_tokens
    prompts, too_long = read_prompts(
        records_of(args.data, args.split), tokenizer, min(args.max_prompt_tokens, room)
    )
    if args.num_prompts:
        prompts = [prompt for prompt in prompts if prompt.index < args.num_prompts]
    if not prompts:
        raise DataError(f"{args.data} holds no prompts of at most {args.max_prompt_tokens} tokens.")
    left = [prompt for prompt in prompts if prompt.index not in done]
    print(
        f"{len(prompts)} prompts, {len(prompts) - len(left)} answered already"
        + (f", {too_long} too long and left out." if too_long else "."),
        flush=True,
    )
    left = list(in_order(left, SORT_WINDOW))
    with tqdm(
        total=len(prompts), initial=len(prompts) - len(left), unit="answer", disable=None
    ) as bar:
        tokens = 0

        def count(record: dict[str, Any]) -> None:
            nonlocal tokens
            tokens += len(record["answer_ids"])
            bar.update()
            bar.set_postfix(tokens=tokens)

        answer_prompts(
            model,
            tokenizer,
            left,
            output,
            max_tokens=args.max_tokens,
            batch_size=args.batch_size,
            sampling=SamplingConfig(temp=args.temp, top_p=args.top_p),
            seed=args.seed,
            on_record=count,
        )
    print(f"{output} holds {len(prompts)} answers.")
    return 0
