"""A plan: the tree a step verifies, when streams run, what is pruned. No plan means plain decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..config import DecodeConfig, Mode, PruneSpec, Schedule, TreeSpec

RunSchedule = Literal["inline", "deferred"]

# Best-first sizes worth a look: all small ones, where every row counts, then those at which the
# blocks of matrix kernels end.
ROWS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
INLINE_ROWS = (2, 3, 5, 8, 12)  # inline, every row brings γ more, so wide trees cannot pay
PRUNED = ((16, 4), (16, 8), (32, 8))  # rows, and how many of them go on into the upper layers
INLINE_PRUNED = ((16, 4), (16, 6))  # 20 and 30 rows there with four streams: matrix units take 32
INLINE_NODES = ((8, 2), (8, 4), (16, 4))  # rows, and how many of them have streams


@dataclass(frozen=True)
class Plan:
    """How to make steps. Hashable: plans are keys of cost curves and statistics.

    stream_nodes: of how many nodes the streams run inline, 0 for all.
    """

    tree: TreeSpec
    schedule: RunSchedule = "deferred"
    prune: PruneSpec | None = None
    stream_nodes: int = 0

    def config(self, base: DecodeConfig) -> DecodeConfig:
        """Return `base` with this plan in place of what it leaves open."""
        return replace(
            base,
            tree=self.tree,
            schedule=self.schedule,
            prune=self.prune,
            stream_nodes=self.stream_nodes,
        )

    def rows(self, num_streams: int) -> int:
        """Return the rows that go through the lower layers."""
        return self.tree.num_nodes(num_streams)

    def upper_rows(self, num_streams: int) -> int:
        """Return the main rows that go through the MSA layers."""
        rows = self.rows(num_streams)
        return rows if self.prune is None else min(rows, self.prune.keep)

    def depth(self, num_streams: int) -> int:
        """Return the most drafts that one step can accept."""
        return min(len(self.tree.level_widths(num_streams)), self.rows(num_streams) - 1)

    @property
    def name(self) -> str:
        """Return the short form that `parse` reads: `8`, `chain3 inline`, `16:8`, `8 inline:2`."""
        schedule: Schedule = "inline" if self.schedule == "inline" else "auto"
        return str(DecodeConfig(self.tree, self.prune, schedule, stream_nodes=self.stream_nodes))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read the short form.

        Raises:
            OptionError: the tree or what is kept of it cannot be read.
        """
        config = DecodeConfig.parse(text)
        schedule: RunSchedule = "inline" if config.schedule == "inline" else "deferred"
        return cls(config.tree, schedule, config.prune, config.stream_nodes)


def candidates(
    num_streams: int,
    mode: Mode,
    schedule: Literal["auto", "inline", "deferred"] = "auto",
    *,
    prunable: bool = False,
    ends_known: bool = False,
    row_limit: int | None = None,
    max_rows: int = max(ROWS),
) -> list[Plan]:
    """Return the plans worth a look, chains first.

    Args:
        prunable: the streams hold a pruner, and what it keeps was recorded.
        ends_known: it was recorded which nodes get streams where not all do.
        row_limit: most rows that the GPU's fused attention for short queries takes; above it and
            up to 8 rows attention falls back to a slow path, so these sizes are left out.
    """
    found = list(_candidates(num_streams, mode, schedule, row_limit, max_rows))
    return [
        plan
        for plan in found
        if (prunable or plan.prune is None) and (ends_known or not plan.stream_nodes)
    ]


def _candidates(
    num_streams: int,
    mode: Mode,
    schedule: str,
    row_limit: int | None,
    max_rows: int,
) -> Iterator[Plan]:
    def fits(rows: int) -> bool:
        slow = row_limit is not None and row_limit < rows <= FUSED_ROWS
        return rows <= max_rows and not slow

    schedules: list[RunSchedule] = ["inline"] if mode == "shared" else ["deferred", "inline"]
    for each in schedules:
        if schedule not in ("auto", each):
            continue
        for depth in range(1, num_streams + 1):
            if fits(depth + 1):
                tree = TreeSpec("chain", branching=1, depth=depth)
                yield Plan(tree, each)
        wide = (
            ROWS if each == "deferred" or schedule == "inline" or mode == "shared" else INLINE_ROWS
        )
        for rows in wide:
            # Two rows are a chain of one draft.
            if rows > 2 and fits(rows):
                yield Plan(TreeSpec("best", rows=rows), each)
        for rows, keep in PRUNED if each == "deferred" else INLINE_PRUNED:
            if fits(rows):
                yield Plan(TreeSpec("best", rows=rows), each, PruneSpec(keep))
        # In shared mode every row sees its streams, so none can be without.
        for rows, nodes in INLINE_NODES if each == "inline" and mode == "lossless" else ():
            if fits(rows):
                yield Plan(TreeSpec("best", rows=rows), each, stream_nodes=nodes)


FUSED_ROWS = 8
"""Rows up to which MLX on Metal uses its attention for short queries, if it takes them at all."""


def fused_row_limit(num_heads: int, num_kv_heads: int) -> int:
    """Return how many rows Metal's attention for short queries takes: rows × group ≤ 32, rows ≤ 8."""
    return min(FUSED_ROWS, 32 // max(1, num_heads // max(1, num_kv_heads)))
