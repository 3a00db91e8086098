"""One recorded answer: for every token, where the tokens that follow stood in the tree drafted there.

A recorded answer holds, for every token t of it, where the tokens that follow stood in the tree
drafted at t, down to the first that no stream had proposed:

    text      the  cat  sat  on        tree at "the", best paths first, root = 0
    order       0    1    5   -          1 cat   2 dog   3 cat ran   4 sun   5 cat sat ...
    rank             1    2   -        "sat" is the second best child of "cat"

Best-first trees are nested, so the tree of M rows holds exactly the nodes with order < M; a
chain holds those of rank 1, the product tree k^γ those of rank ≤ k; a path counts up to its
first node that is missing. Walking an answer step by step, as decoding does, then gives the
tokens per step of any tree without another pass of the model, conditional on the path because
the path is the real one.

What a pass itself would decide, and no other pass can tell, is recorded for trees of a few sizes:
in which order the early exit keeps their nodes, and in which order they get streams inline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..config import TreeSpec
from .settings import StepSetting


@dataclass(frozen=True)
class Position:
    """One token's tree: order and rank of each following token in turn, until one is missing.

    By the tree's rows, for some sizes: pruned, the order that the early exit gives the following
    tokens; ends, the order in which the root and they are thought to be where the path ends.
    chances: the path probabilities of the best nodes by the streams' own word, the root's first; they are
    not written to files.
    """

    orders: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    pruned: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    ends: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    chances: tuple[float, ...] = field(default=(), compare=False)

    def expected(self, rows: int) -> float:
        """Return how many drafts of the best-first tree of `rows` rows should be accepted."""
        return sum(self.chances[1:rows])

    def accepted(self, plan: StepSetting, num_streams: int) -> int:
        """Return how many drafts a step with this plan accepts here."""
        tree, kept = plan.tree, 0
        deepest = min(tree.depth or num_streams, num_streams, len(self.orders))
        survivors = self.pruned.get(tree.rows) if plan.prune is not None else None
        while kept < deepest and self._holds(tree, kept):
            if plan.prune is not None and (
                survivors is None or kept >= len(survivors) or survivors[kept] >= plan.prune.keep
            ):
                break
            kept += 1
        return kept

    def drafts(self, plan: StepSetting, accepted: int) -> bool:
        """Tell whether streams are where a step ends that accepts so many drafts."""
        if not plan.stream_nodes:
            return True
        ends = self.ends.get(plan.tree.rows, ())
        return accepted < len(ends) and ends[accepted] < plan.stream_nodes

    def _holds(self, tree: TreeSpec, level: int) -> bool:
        if tree.kind == "chain":
            return self.ranks[level] == 1
        if tree.kind == "product":
            return self.ranks[level] <= tree.branching
        return self.orders[level] < tree.rows


@dataclass(frozen=True)
class AnswerTrace:
    """One answer: the positions of its tokens, in order, and the task it belongs to."""

    positions: tuple[Position, ...]
    task: str = "chat"

    def walk(self, plan: StepSetting, num_streams: int) -> list[int]:
        """Return the accepted drafts of each step over the answer, as decoding takes them.

        A step that ends where no streams are is followed by one of the root alone.
        """
        found, at, drafted = [], 0, True
        while at < len(self.positions) - 1:
            here = self.positions[at]
            accepted = here.accepted(plan, num_streams) if drafted else 0
            drafted = not drafted or here.drafts(plan, accepted)
            found.append(accepted)
            at += accepted + 1
        return found


def written(positions: Sequence[Position]) -> dict[str, object]:
    """Return the JSON form; a position is `order.rank order.rank`, with `;` between positions."""

    def pairs(position: Position) -> str:
        both = zip(position.orders, position.ranks, strict=True)
        return " ".join(f"{order}.{rank}" for order, rank in both)

    found: dict[str, object] = {"drafted": ";".join(pairs(p) for p in positions)}
    for name in ("pruned", "ends"):
        by_rows: list[Mapping[int, tuple[int, ...]]] = [getattr(p, name) for p in positions]
        sizes = sorted({rows for one in by_rows for rows in one})
        if sizes:
            found[name] = {
                str(rows): ";".join(" ".join(map(str, one.get(rows, ()))) for one in by_rows)
                for rows in sizes
            }
    return found


def read(values: Mapping[str, object]) -> tuple[Position, ...]:
    """Read the JSON form.

    Raises:
        KeyError, ValueError, TypeError, IndexError, AssertionError: it is damaged.
    """
    drafted = str(values["drafted"]).split(";")
    pruned, ends = (_by_rows(values.get(name, {}), len(drafted)) for name in ("pruned", "ends"))
    positions = []
    for text, kept, ended in zip(drafted, pruned, ends, strict=True):
        pairs = [pair.split(".") for pair in text.split()]
        orders, ranks = ([int(pair[side]) for pair in pairs] for side in (0, 1))
        positions.append(Position(tuple(orders), tuple(ranks), kept, ended))
    return tuple(positions)


def _by_rows(values: object, count: int) -> list[dict[int, tuple[int, ...]]]:
    """Return for each of `count` positions what is recorded of trees by their rows."""
    assert isinstance(values, dict)
    found: list[dict[int, tuple[int, ...]]] = [{} for _ in range(count)]
    for rows, text in values.items():
        for one, orders in zip(found, str(text).split(";"), strict=True):
            if orders:
                one[int(rows)] = tuple(map(int, orders.split()))
    return found
