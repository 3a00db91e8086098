"""What one decoding step decided, on the host: the only place where a loop waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from .cache import KVCache
from .errors import ModelError


@dataclass(frozen=True)
class DraftRecord:
    """A verified tree on the host: node 0 is the root; `accepted` are the nodes of its path."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    accepted: list[int]


@dataclass(frozen=True)
class StepResult:
    """What one step decided.

    tokens: the n tokens it emits, the last one the next root. drafted: draft nodes verified.
    logits: (n, V) on the device, lazily, the target's at each emitted token.
    draft: the verified tree, if it was asked for.
    """

    tokens: list[int]
    drafted: int
    logits: mx.array
    draft: DraftRecord | None = None

    @property
    def accepted(self) -> int:
        """Return how many drafts were accepted."""
        return len(self.tokens) - 1

    @property
    def origins(self) -> list[int]:
        """Return the stream that proposed each token: 1, 2, ... in order, then 0 for main."""
        return [*range(1, len(self.tokens)), 0]


def read_report(
    report: mx.array, places: int, cache: KVCache
) -> tuple[list[int], list[int], list[int]]:
    """Wait for a step's report; return the path's tokens, nodes, and rows in the lower layers.

    `places` is the longest path the step's tree can hold: its depth + 1.

    Raises:
        ModelError: the model computed NaN.
    """
    accepted, finite, *values = to_ints(report)
    if not finite:
        raise ModelError(
            f"the model's output is not a number (NaN) after {cache.length} tokens: its weights "
            "are damaged, or overflow in this precision; check the files or use another dtype."
        )
    tokens, nodes = values[:places], values[places : 2 * places]
    lower_rows = values[2 * places :] or nodes
    kept = accepted + 1
    return tokens[:kept], nodes[:kept], lower_rows[:kept]


def to_ints(array: mx.array) -> list[int]:
    """Return a vector of integers on the host."""
    return cast(list[int], array.tolist())
