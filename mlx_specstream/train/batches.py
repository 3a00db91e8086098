"""Which texts and which of their positions a step trains on: a function of seed and step alone.

Nothing random is kept between steps, so a run that was killed finds its place again by counting,
and every process of a data-parallel run knows the whole batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .data import Example

T = TypeVar("T")

LENGTH_STEP = 16
"""Texts whose lengths round up to the same multiple of this count as equally long."""


@dataclass(frozen=True)
class Selection:
    """A text and the positions of it that get streams in this step, ascending."""

    example: Example
    positions: tuple[int, ...]

    @property
    def rows(self) -> list[int]:
        """Return the positions counted from the last prompt token, which is row 0."""
        return [t + 1 - self.example.prompt_length for t in self.positions]


@dataclass(frozen=True)
class BatchPlan:
    """An endless order of batches: epoch after epoch, each text once per epoch."""

    examples: Sequence[Example]
    batch_size: int
    fraction: float
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def batch(self, number: int) -> list[Selection]:
        """Return batch `number`, counted from the start of training."""
        epoch, place = divmod(number, self.batches_per_epoch)
        order = epoch_order(
            [len(example.tokens) for example in self.examples], self.batch_size, self.seed, epoch
        )
        return [
            select(self.examples[index], self.fraction, (self.seed, epoch, int(index)))
            for index in order[place]
        ]


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch: neighbours in length together, batches in random order."""
    random = np.random.default_rng((seed, epoch))
    shuffled = random.permutation(len(lengths))
    rounded = [-(-lengths[index] // LENGTH_STEP) for index in shuffled]
    by_length = shuffled[np.argsort(rounded, kind="stable")].tolist()
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[index] for index in random.permutation(len(batches))]


def select(example: Example, fraction: float, seed: Sequence[int]) -> Selection:
    """Choose a random `fraction` of a text's positions, at least one."""
    every = example.positions
    if fraction >= 1:
        return Selection(example, tuple(every))
    count = max(1, round(len(every) * fraction))
    chosen = np.random.default_rng(seed).choice(len(every), size=count, replace=False)
    return Selection(example, tuple(every[int(i)] for i in np.sort(chosen)))


def number_of(example: Example) -> int:
    """Return a number that a text keeps in data that grows, to seed what is drawn for it."""
    name = hashlib.sha256(repr(example.key).encode()).digest()
    return int.from_bytes(name[:8], "big")


def alike(items: Iterable[T], prompt: Callable[[T], Sequence[int]]) -> list[list[T]]:
    """Group items whose prompts agree with their neighbour in sorted order in half of their tokens."""
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


def grouped(examples: Sequence[Example], size: int, seed: Sequence[int]) -> list[Example]:
    """Shuffle, but keep up to `size` texts whose prompts begin alike together."""
    random = np.random.default_rng(seed)
    runs = []
    for group in alike(examples, lambda example: example.prompt):
        order = [group[index] for index in random.permutation(len(group))]
        runs += [order[start : start + size] for start in range(0, len(order), size)]
    return [example for index in random.permutation(len(runs)) for example in runs[index]]


def epoch_batches(
    examples: Sequence[Example],
    *,
    num_positions: int,
    fraction: float,
    seed: int,
    epoch: int,
    group_size: int = 1,
) -> Iterator[list[Selection]]:
    """Yield one epoch's batches of about `num_positions` positions each, for rows that need no padding.

    A function of its arguments alone; a last batch of less than half is left out, unless it is all
    there is. group_size: texts whose prompts begin alike that stand together, as far as there are any.
    """
    batch: list[Selection] = []
    filled = found = 0
    for example in grouped(examples, group_size, (seed, epoch)):
        batch.append(select(example, fraction, (seed, epoch, number_of(example))))
        filled += len(batch[-1].positions)
        if filled >= num_positions:
            yield batch
            batch, filled, found = [], 0, found + 1
    if filled > num_positions // 2 or (batch and not found):
        yield batch


def shard(batch: Sequence[Selection], rank: int, size: int) -> list[Selection]:
    """Return one process's share of a batch: every `size`-th text, so that lengths are alike."""
    return list(batch[rank::size])
