"""A setting of a step: the tree a step verifies, when streams run, what is pruned. None means plain decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..config import DecodeConfig, Mode, PruneSpec, Schedule, TreeSpec
from ..model.attention import FusedAttention

RunSchedule = Literal["inline", "deferred"]

# Best-first sizes worth a look: all small ones, where every row counts, then those at which the
# blocks of matrix kernels end.
ROWS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
INLINE_ROWS = (2, 3, 5, 8, 12)  # inline, every row brings γ more, so wide trees cannot pay
PRUNED = ((16, 4), (16, 8), (32, 8))  # rows, and how many of them go on into the upper layers
INLINE_PRUNED = ((16, 4), (16, 6))  # 20 and 30 rows there with four streams: matrix units take 32
INLINE_NODES = ((8, 2), (8, 4), (16, 4))  # rows, and how many of them have streams


@dataclass(frozen=True)
class StepSetting:
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

    def passes(self, num_streams: int) -> tuple[int, int]:
        """Return the rows that attend at once in the lower layers, and with the verified tree in
        the upper ones, where an inline step has its streams beside it.
        """
        upper = self.upper_rows(num_streams)
        beside = min(self.stream_nodes or upper, upper) if self.schedule == "inline" else 0
        return self.rows(num_streams), upper + beside * num_streams

    def depth(self, num_streams: int) -> int:
        """Return the most drafts that one step can accept."""
        return min(len(self.tree.level_widths(num_streams)), self.rows(num_streams) - 1)

    @property
    def name(self) -> str:
        """Return the short form that `parse` reads: `8`, `chain3 inline`, `16:8`, `8 inline:2`."""
        schedule: Schedule = "inline" if self.schedule == "inline" else "auto"
        return str(DecodeConfig(self.tree, self.prune, schedule, stream_nodes=self.stream_nodes))

    @classmethod
    def parse(cls, text: str) -> StepSetting:
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
    attention: FusedAttention | None = None,
    max_rows: int = max(ROWS),
) -> list[StepSetting]:
    """Return the plans worth a look, chains first.

    Args:
        prunable: the streams hold a pruner, and what it keeps was recorded.
        ends_known: it was recorded which nodes get streams where not all do.
        attention: what the GPU's fused attention takes; plans with a pass that it takes in pieces
            only are left out. Not for the streams' own pass in a deferred step, nor for the root
            alone with its streams: they have as many rows in every plan, whose time is measured.
    """
    return [
        plan
        for plan in _candidates(num_streams, mode, schedule)
        if (prunable or plan.prune is None)
        and (ends_known or not plan.stream_nodes)
        and plan.rows(num_streams) <= max_rows
        and not (attention and any(map(attention.loses, plan.passes(num_streams))))
    ]


def _candidates(num_streams: int, mode: Mode, schedule: str) -> Iterator[StepSetting]:
    schedules: list[RunSchedule] = ["inline"] if mode == "shared" else ["deferred", "inline"]
    for each in schedules:
        if schedule not in ("auto", each):
            continue
        for depth in range(1, num_streams + 1):
            yield StepSetting(TreeSpec("chain", branching=1, depth=depth), each)
        wide = (
            ROWS if each == "deferred" or schedule == "inline" or mode == "shared" else INLINE_ROWS
        )
        for rows in wide:
            # Two rows are a chain of one draft.
            if rows > 2:
                yield StepSetting(TreeSpec("best", rows=rows), each)
        for rows, keep in PRUNED if each == "deferred" else INLINE_PRUNED:
            yield StepSetting(TreeSpec("best", rows=rows), each, PruneSpec(keep))
        # In shared mode every row sees its streams, so none can be without.
        for rows, nodes in INLINE_NODES if each == "inline" and mode == "lossless" else ():
            yield StepSetting(TreeSpec("best", rows=rows), each, stream_nodes=nodes)
