"""Several processes that make one optimizer step together; a single process needs none of it.

Every process builds the same batch and computes its share of the stream positions; gradients are added up. The batch is
cut by positions, not by texts, so that no process waits for another:

    text a ▆▆▆▆▆▆   text b ▆▆▆▆▆▆▆▆▆▆   text c ▆▆▆▆
    process 0: a, first 4 of b          process 1: last 6 of b, c
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import distributed, nn

from ...train.batches import Selection

T = TypeVar("T")


@contextmanager
def group() -> Iterator[None]:
    """Join the processes that `torchrun` started, if it did."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's number; 0 writes logs and checkpoints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def share(batch: Sequence[Selection]) -> tuple[list[Selection], slice]:
    """Return this process's part of a batch, and which of the batch's positions these are."""
    total = sum(len(s.positions) for s in batch)
    start, stop = (total * r // count() for r in (rank(), rank() + 1))
    mine, seen = [], 0
    for selection in batch:
        n = len(selection.positions)
        part = selection.positions[max(0, start - seen) : max(0, stop - seen)]
        if part:
            mine.append(Selection(selection.example, part))
        seen += n
    return mine, slice(start, stop)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the processes' gradients in place; a parameter without one counts as zero."""
    if count() == 1:
        return
    grads = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    flat = torch.cat([g.flatten() for g in grads])
    distributed.all_reduce(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def first_s(seconds: float) -> float:
    """Return process 0's value, so that all agree about the time."""
    if count() == 1:
        return seconds
    value = torch.tensor([seconds], dtype=torch.float64)
    distributed.broadcast(value, 0)
    return float(value)


def gather(parts: list[T]) -> list[T]:
    """Return every process's list, one after another."""
    if count() == 1:
        return parts
    everything: list[list[T]] = [[] for _ in range(count())]
    distributed.all_gather_object(everything, parts)
    return [part for parts in everything for part in parts]
