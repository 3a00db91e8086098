"""What one decoding step decided: the report it makes on the device, and its result on the host.

`StepReport.read` is the only place where a loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import mlx.core as mx

LOOK_UP = -1
"""The origin of a token that look-up proposed, and was surer of than streams."""


@dataclass(frozen=True)
class DraftRecord:
    """A verified tree on the host: node 0 is the root; `accepted` are the nodes of its path.

    looked_up: the nodes that look-up was surer of than streams.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    accepted: list[int]
    looked_up: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What one step decided.

    tokens: the n tokens it emits, the last one the next root. drafted: draft nodes verified.
    logits: (n, V) on the device, lazily, the target's at each emitted token.
    draft: the verified tree, if it was asked for. expected: () float32 on the device, how many
    drafts of the next tree should be accepted by its own probabilities; None without a next tree.
    looked_up: which of the accepted drafts look-up was surer of than streams; empty for none.
    """

    tokens: list[int]
    drafted: int
    logits: mx.array
    draft: DraftRecord | None = None
    expected: mx.array | None = None
    looked_up: Sequence[bool] = ()

    @property
    def accepted(self) -> int:
        """Return how many drafts were accepted."""
        return len(self.tokens) - 1

    @property
    def origins(self) -> list[int]:
        """Return what proposed each token: stream 1, 2, ... in order or `LOOK_UP`, then 0 for main."""
        found = self.looked_up or [False] * self.accepted
        return [*(LOOK_UP if by else n for n, by in enumerate(found, start=1)), 0]


class StopCriteria(Protocol):
    """Decides after every step whether the text needs another one."""

    def should_continue(self, result: StepResult) -> bool:
        """Take in a step's result and tell whether another step is wanted."""
        ...


@dataclass
class MaxTokens:
    """Stops when so many tokens are out, or with one of `stop`; `max_tokens` < 0: no limit."""

    max_tokens: int = -1
    stop: Collection[int] = ()
    tokens: list[int] = field(default_factory=list)

    def should_continue(self, result: StepResult) -> bool:
        """Take in a step's tokens; those behind the end are not kept."""
        for token in result.tokens:
            self.tokens.append(token)
            if token in self.stop or 0 <= self.max_tokens <= len(self.tokens):
                return False
        return True


@dataclass(frozen=True)
class StepReport:
    """All that the host needs of a step, in one array, so that it waits for the device once.

    packed: (B, n) int32, a row per sequence. fields: what stands in it, from left to right, and
    how many numbers each field has:

        accepted      1, how many drafts were accepted
        finite        1 or more, whether no logit is NaN
        tokens        drawn at the path's nodes; the first `accepted` + 1 count
        nodes         (trees) the path's nodes, as many as tokens
        lower_rows    (pruned trees) where these nodes' rows are in the lower layers
        stream_nodes  (streams at some nodes) which nodes had streams
        looked_up     (trees with look-up) which of the path's nodes look-up was surer of
        chain         (batches) root and drafts that were verified
    """

    packed: mx.array
    fields: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, **parts: mx.array | None) -> StepReport:
        """Pack integers or booleans, each () or (n,), or (B,) or (B, n) in a batch; None is left out."""
        batch = parts["tokens"] is not None and parts["tokens"].ndim == 2
        columns = {
            name: part.reshape(part.shape[0] if batch else 1, -1).astype(mx.int32)
            for name, part in parts.items()
            if part is not None
        }
        fields = tuple((name, column.shape[1]) for name, column in columns.items())
        return cls(mx.concatenate(list(columns.values()), axis=1), fields)

    def read(self) -> list[Verdict]:
        """Wait for the device and return what the step decided, per sequence."""
        return [self._verdict(row) for row in cast(list[list[int]], self.packed.tolist())]

    def _verdict(self, row: list[int]) -> Verdict:
        values, at = {}, 0
        for name, width in self.fields:
            values[name] = row[at : at + width]
            at += width
        kept = values["accepted"][0] + 1
        nodes = values.get("nodes", list(range(kept)))[:kept]
        with_streams = values.get("stream_nodes")
        return Verdict(
            finite=all(values["finite"]),
            tokens=values["tokens"][:kept],
            nodes=nodes,
            lower_rows=values.get("lower_rows", nodes)[:kept],
            drafting=with_streams is None or nodes[-1] in with_streams,
            chain=values.get("chain", []),
            looked_up=[bool(found) for found in values.get("looked_up", [])[1:kept]],
        )


@dataclass(frozen=True)
class Verdict:
    """A step's accepted path on the host: its tokens, nodes, and their rows in the lower layers.

    finite: False if the model computed NaN. drafting: the last of `nodes` had streams, so there is
    a next tree. chain: see `StepReport`. looked_up: see `StepResult`.
    """

    finite: bool
    tokens: list[int]
    nodes: list[int]
    lower_rows: list[int]
    drafting: bool = True
    chain: list[int] = field(default_factory=list)
    looked_up: list[bool] = field(default_factory=list)


def to_ints(array: mx.array) -> list[int]:
    """Return a vector of integers on the host."""
    return cast(list[int], array.tolist())


def to_float(array: mx.array) -> float:
    """Return a number on the host; waits for it."""
    return cast(float, array.item())
