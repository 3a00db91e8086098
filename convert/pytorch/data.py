"""Targets and batches of the packed trainer; texts are read by `mlx_specstream.train.data`.

Stream positions are the last prompt token and every answer
token that still has a target; with P prompt and A answer tokens, position i stands at t = P - 1 + i and

    root x_{t+1} = answer[i]      stream j: parent x_{t+j} = answer[i+j-1], target x_{t+1+j} = answer[i+j]

with answer[-1] the last prompt token, which is the parent of the first root.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...train.batches import Selection
from ...train.data import Example, read_records, tokenize

T = TypeVar("T")


def read_examples(
    files: Iterable[str | Path], tokenizer: Any = None, max_length: int = 1024
) -> list[Example]:
    """Read the training texts of all files; those of more than `max_length` tokens are left out.

    Raises:
        DataError: a line is not JSON or holds no text in a known form.
    """
    examples = []
    for file in files:
        records = read_records(file, "train")
        examples += tokenize(records, tokenizer, max_length=max_length, cut=False)[0]
    return examples


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
        for i in selection.rows:
            windows.append(padded[i : i + num_streams + 2])
            valid.append([i + j < len(answer) for j in range(1, num_streams + 1)])
    around = torch.tensor(windows)
    return Targets(around[:, 2:], around[:, 1:-1], around[:, :-2], torch.tensor(valid))


def select(example: Example, fraction: float, seed: str) -> Selection:
    """Choose a random `fraction` of an example's positions, at least one."""
    every = example.positions
    chosen = random.Random(seed).sample(every, max(1, round(len(every) * fraction)))  # noqa: S311
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
