"""What one decoding step decided, on the host: the only place where a loop waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx

from ..errors import ModelError
from ..model.cache import KVCache


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
    draft: the verified tree, if it was asked for. expected: () float32 on the device, how many
    drafts of the next tree should be accepted by its own probabilities; None without a next tree.
    """

    tokens: list[int]
    drafted: int
    logits: mx.array
    draft: DraftRecord | None = None
    expected: mx.array | None = None

    @property
    def accepted(self) -> int:
        """Return how many drafts were accepted."""
        return len(self.tokens) - 1

    @property
    def origins(self) -> list[int]:
        """Return the stream that proposed each token: 1, 2, ... in order, then 0 for main."""
        return [*range(1, len(self.tokens)), 0]


class Report(NamedTuple):
    """A step's accepted path on the host: its tokens, nodes, and their rows in the lower layers.

    drafting: whether the last of `nodes` had streams, so that there is a next tree.
    """

    tokens: list[int]
    nodes: list[int]
    lower_rows: list[int]
    drafting: bool = True


def read_report(report: mx.array, places: int, cache: KVCache, stream_nodes: int = 0) -> Report:
    """Wait for a step's report, a vector of integers as `Step` describes it.

    `places` is the longest path the step's tree can hold: its depth + 1.

    Raises:
        ModelError: the model computed NaN.
    """
    accepted, finite, *values = to_ints(report)
    if not finite:
        raise not_a_number(cache.length)
    kept = accepted + 1
    tokens, nodes = values[:kept], values[places : places + kept]
    lower_rows, with_streams = nodes, values[len(values) - stream_nodes :]
    if len(values) - stream_nodes > 2 * places:
        lower_rows = values[2 * places : 2 * places + kept]
    drafting = not stream_nodes or nodes[-1] in with_streams
    return Report(tokens, nodes, lower_rows, drafting)


def not_a_number(length: int) -> ModelError:
    """Return the error of a model that computed NaN behind `length` committed tokens."""
    return ModelError(
        f"the model's output is not a number (NaN) after {length} tokens: its weights are "
        "damaged, or overflow in this precision; check the files or use another dtype."
    )


def to_ints(array: mx.array) -> list[int]:
    """Return a vector of integers on the host."""
    return cast(list[int], array.tolist())


def to_float(array: mx.array) -> float:
    """Return a number on the host; waits for it."""
    return cast(float, array.item())
