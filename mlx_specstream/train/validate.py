"""Held-out figures while a run lasts, and how they are told."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .batches import select
from .data import Example
from .loss import Tensors
from .measure import Ranks
from .objective import LosslessObjective
from .options import TrainOptions

HELD_OUT_FRACTION = 0.5  # of a held-out text's positions, fixed


def validate(
    objective: LosslessObjective, tensors: Tensors, texts: Sequence[Example], options: TrainOptions
) -> dict[str, object]:
    """Measure the held-out texts at a fixed half of their positions."""
    size = options.batch_size
    ranks: list[Ranks] = []
    by_length = sorted(texts, key=lambda example: len(example.tokens))
    chosen = [select(e, HELD_OUT_FRACTION, (0, i)) for i, e in enumerate(by_length)]
    batches = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    if 0 <= options.val_batches < len(batches):
        spread = np.linspace(0, len(batches) - 1, options.val_batches).round()
        batches = [batches[int(i)] for i in spread]
    for batch in batches:
        ranks += objective.measure(tensors, batch)
    return objective.figures(ranks) if ranks else {"loss": [math.inf]}


def describe(figures: dict[str, object]) -> str:
    """Return a validation's figures in a line."""

    def row(name: str) -> str:
        values = figures[name]
        assert isinstance(values, list)
        return "/".join(f"{v:.2f}".removeprefix("0") for v in values)

    if "exit_top1" in figures:
        return f"early exit: top-1 {row('exit_top1')}, top-3 {row('exit_top3')}"
    parts = []
    for name, word in (("marginal", "streams"), ("conditioned", "given their parent")):
        if f"{name}_top1" in figures:
            parts.append(
                f"{word}: top-1 {row(f'{name}_top1')}, top-3 {row(f'{name}_top3')}, "
                f"chain {figures[f'{name}_chain']} tokens per step"
            )
    return "; ".join(parts)
