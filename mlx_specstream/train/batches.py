"""Which texts and which of their positions a step trains on: a function of seed and step alone.

Nothing random is kept between steps, so a run that was killed finds its place again by counting,
and every process of a data-parallel run knows the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .data import Example

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


def select(example: Example, fraction: float, seed: tuple[int, ...]) -> Selection:
    """Choose a random `fraction` of a text's positions, at least one."""
    every = example.positions
    if fraction >= 1:
        return Selection(example, tuple(every))
    count = max(1, round(len(every) * fraction))
    chosen = np.random.default_rng(seed).choice(len(every), size=count, replace=False)
    return Selection(example, tuple(every[int(i)] for i in np.sort(chosen)))


def shard(batch: Sequence[Selection], rank: int, size: int) -> list[Selection]:
    """Return one process's share of a batch: every `size`-th text, so that lengths are alike."""
    return list(batch[rank::size])
