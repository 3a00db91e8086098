"""Several processes, one run: each takes every n-th text of a batch, gradients are summed.

MLX's own distributed back end and launcher: `mlx.launch -n 2 specstream train ...`. The weights of
a batch's rows are counted over the whole batch, so sums over processes are what one process
computes with all of the texts. Process 0 writes; all of them make the same decisions.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from .objective import BatchResult


def sum_results(result: BatchResult, world: mx.distributed.Group) -> BatchResult:
    """Return the sum of every process's result, in one message."""
    if world.size() == 1:
        return result
    names = sorted(result.gradients)
    sums = [np.array([result.total]), result.marginal]
    if result.conditioned is not None:
        sums.append(result.conditioned)
    numbers = np.concatenate(sums).astype(np.float32)
    parts = [result.gradients[name].astype(mx.float32).reshape(-1) for name in names]
    message = mx.concatenate([*parts, mx.array(numbers)])
    message = mx.distributed.all_sum(message, group=world)
    mx.eval(message)
    place, gradients = 0, {}
    for name in names:
        old = result.gradients[name]
        size = math.prod(old.shape)
        gradients[name] = message[place : place + size].reshape(old.shape)
        place += size
    told = np.array(message[place:], dtype=np.float64)
    G = len(result.marginal)
    conditioned = told[1 + G : 1 + 2 * G] if result.conditioned is not None else None
    return BatchResult(gradients, float(told[0]), told[1 : 1 + G], conditioned, result.extra)


def wait_for_all(world: mx.distributed.Group) -> None:
    """Return once every process has come here."""
    if world.size() > 1:
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=world))
