"""Training texts as token ids, and the batches that the packed trainer eats.

A record holds `prompt_ids` and `answer_ids` (`distill.py` writes them), or `messages` / `prompt` + `completion`, which
are turned into ids with the tokenizer's chat template. Stream positions are the last prompt token and every answer
token that still has a target; with P prompt and A answer tokens, position i stands at t = P - 1 + i and

    root x_{t+1} = answer[i]      stream j: parent x_{t+j} = answer[i+j-1], target x_{t+1+j} = answer[i+j]

with answer[-1] the last prompt token, which is the parent of the first root.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import DataError
from ...prompts.lines import json_lines

Key = tuple[str, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One text: `prompt` is given, `answer` is to be foreseen."""

    key: Key
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def num_positions(self) -> int:
        """Positions whose first stream has a target."""
        return max(0, len(self.answer) - 1)


def read_examples(
    files: Iterable[str | Path], tokenizer: object = None, max_length: int = 1024
) -> list[Example]:
    """Read JSON-lines files; texts with fewer than two answer tokens or more than `max_length` in all are left out.

    Raises:
        DataError: a line is not JSON or holds no text in a known form.
    """
    examples = []
    for file in map(Path, files):
        for number, (record, where) in enumerate(json_lines(file)):
            if not isinstance(record, dict):
                raise DataError(f"{where} must be a JSON object, got {type(record).__name__}.")
            prompt, answer = record_ids(record, tokenizer, where)
            key = (str(record.get("source", file.stem)), int(record.get("index", number)))
            if len(answer) > 1 and len(prompt) + len(answer) <= max_length:
                examples.append(Example(key, tuple(prompt), tuple(answer)))
    return examples


def record_ids(
    record: dict[str, object], tokenizer: object, where: str
) -> tuple[list[int], list[int]]:
    """Return prompt and answer ids of one record."""
    if "answer_ids" in record:
        return list(record["prompt_ids"]), list(record["answer_ids"])  # type: ignore[call-overload]
    messages = record.get("messages")
    if messages is None and "completion" in record:
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    if not isinstance(messages, list) or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where} has neither answer_ids, nor messages that end with the assistant, nor a completion."
        )
    if tokenizer is None:
        raise DataError(f"{where} holds text, not ids; a tokenizer is needed.")
    template = tokenizer.apply_chat_template  # type: ignore[attr-defined]
    prompt = list(template(messages[:-1], add_generation_prompt=True, return_dict=False))
    answer = list(tokenizer.encode(messages[-1]["content"], add_special_tokens=False))  # type: ignore[attr-defined]
    return prompt, [*answer, tokenizer.eos_token_id]  # type: ignore[attr-defined]


def split_held_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Return (train, held out): the `count` texts whose prompts hash lowest; more data barely moves the split."""

    def rank(example: Example) -> bytes:
        return hashlib.sha256(json.dumps(example.prompt).encode()).digest()

    held_prompts = {e.prompt for e in sorted(examples, key=rank)[:count]}
    train = [e for e in examples if e.prompt not in held_prompts]
    held = [e for e in examples if e.prompt in held_prompts]
    return train, held


@dataclass(frozen=True)
class Selection:
    """An example and the positions of it that get streams, ascending, each < num_positions."""

    example: Example
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Targets:
    """What the stream rows of a batch are to predict, rows in the order (position, stream).

    tokens, parents, grandparents: (N, γ) int64; a parent of stream 1 is the root x_{t+1}, its own parent x_t.
    valid: (N, γ) bool, false past the end of a text.
    """

    tokens: Tensor
    parents: Tensor
    grandparents: Tensor
    valid: Tensor

    def rows(self, rows: slice | Tensor) -> Targets:
        """Return the targets of some positions."""
        return Targets(
            *(t[rows] for t in (self.tokens, self.parents, self.grandparents, self.valid))
        )


def targets(batch: Sequence[Selection], num_streams: int) -> Targets:
    """Collect targets, true parents and their parents of every selected position."""
    windows, valid = [], []
    for selection in batch:
        answer = selection.example.answer
        padded = selection.example.prompt[-1:] + answer + (0,) * num_streams
        for i in selection.positions:
            windows.append(padded[i : i + num_streams + 2])
            valid.append([i + j < len(answer) for j in range(1, num_streams + 1)])
    around = torch.tensor(windows)
    return Targets(around[:, 2:], around[:, 1:-1], around[:, :-2], torch.tensor(valid))


def select(example: Example, fraction: float, seed: str) -> Selection:
    """Choose a random `fraction` of an example's positions, at least one."""
    count = example.num_positions
    chosen = random.Random(seed).sample(range(count), max(1, round(count * fraction)))  # noqa: S311
    return Selection(example, tuple(sorted(chosen)))


def alike(items: Iterable[T], prompt: Callable[[T], Sequence[int]]) -> list[list[T]]:
    """Group items whose prompts share at least half of the longer one's tokens with their neighbour in sorted order."""
    groups: list[list[T]] = []
    last: Sequence[int] = ()
    for item in sorted(items, key=lambda item: tuple(prompt(item))):
        ids = prompt(item)
        same = next(
            (i for i, (a, b) in enumerate(zip(last, ids, strict=False)) if a != b),
            min(len(last), len(ids)),
        )
        if not groups or 2 * same < max(len(ids), len(last)):
            groups.append([])
        groups[-1].append(item)
        last = ids
    return groups


def grouped(examples: Sequence[Example], size: int, seed: str) -> list[Example]:
    """Return the examples in random order, but up to `size` of those whose prompts begin alike stand together."""
    draw = random.Random(seed)  # noqa: S311
    runs = []
    for group in alike(examples, lambda example: example.prompt):
        draw.shuffle(group)
        runs += [group[start : start + size] for start in range(0, len(group), size)]
    draw.shuffle(runs)
    return [example for run in runs for example in run]


def epoch_batches(
    examples: Sequence[Example],
    *,
    num_positions: int,
    fraction: float,
    seed: int,
    epoch: int,
    group_size: int = 1,
) -> Iterator[list[Selection]]:
    """Yield one epoch's batches of about `num_positions` stream positions; a function of its arguments alone.

    `group_size`: texts whose prompts begin alike that stand together, as far as there are any.
    """
    order = list(examples)
    if group_size > 1:
        order = grouped(order, group_size, f"{seed}/{epoch}")
    else:
        random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311
    batch: list[Selection] = []
    filled = 0
    for example in order:
        batch.append(select(example, fraction, f"{seed}/{epoch}/{example.key}"))
        filled += len(batch[-1].positions)
        if filled >= num_positions:
            yield batch
            batch, filled = [], 0
    if filled > num_positions // 2:
        yield batch
