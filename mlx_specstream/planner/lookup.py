"""Whether to verify looked-up drafts where nothing else drafts, and how many rows of them.

A step of several rows costs more than a token of plain decoding, and waits for the host, which plain
decoding does not. What it costs is learnt by the clock while decoding, from a cautious guess; what it
yields is what look-up expects of itself, which is learnt too. A step is made where that pays, so an
answer that quotes nothing is decoded plainly throughout.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..config import DecodeConfig
from ..errors import OptionError
from ..model.backbone import Backbone
from ..speculation.drafters.lookup import Continuations
from .costs import fused_attention, is_planned
from .identity import this_machine

if TYPE_CHECKING:
    from ..loading.load import StreamModel

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # rows of a step
MARGIN = 0.1  # a step must promise so much more tokens per second than plain decoding
SMOOTHING = 0.2  # weight of the newest timing
TRUST = 0.05  # weight of one expected draft in the share of them that is accepted
LONGEST = 3.0  # a timing that took this much longer than expected was interrupted
SLOPE = {"metal": 0.04, "cuda": 0.02}  # of a plain token, that another row is thought to cost
DEAR_ROWS = 0.12  # the same elsewhere


@dataclass
class LookUpPlanner:
    """Chooses the rows of look-up steps for one model; lives across answers.

    base: rows of a step without look-up, which is a plain token unless a batch drafts beside it.
    sizes: to choose from, ascending.
    slope: what a row is thought to cost in steps of `base` rows, until steps have been timed. clock:
    seconds; None times nothing. plain_s: smoothed seconds of a step of `base` rows, 0 before the
    first. ratios: what steps of each size cost.
    """

    slope: float = DEAR_ROWS
    sizes: Sequence[int] = SIZES
    base: int = field(default=1, kw_only=True)
    clock: Callable[[], float] | None = time.perf_counter
    plain_s: float = 0.0
    ratios: dict[int, float] = field(default_factory=dict)
    trust: float = 1.0
    _last_step: float | None = None
    _paused: float = 0.0

    def cost(self, rows: int) -> float:
        """Return what a step of so many rows costs in plain tokens."""
        if rows in self.ratios:
            return self.ratios[rows]
        guess = 1 + self.slope * (rows - self.base)
        if not self.ratios:
            return guess
        near = min(self.ratios, key=lambda known: abs(known - rows))
        return guess * self.ratios[near] / (1 + self.slope * (near - self.base))

    def choose(self, *found: Continuations, tokens: float = 1.0) -> int:
        """Return the rows of the step that pays most, root included; 0 where none of look-up does.

        found: of each text that shares the step. tokens: what each text gets out of `base` rows.
        """
        within = self._promised(found, self.base)
        tokens = max(tokens, 1 + within)
        best, rows = (1 + MARGIN) * tokens, 0
        longest = max(map(len, found))
        for size in self.sizes:
            if size <= self.base:
                continue
            if size > 2 and size > 2 * (1 + longest):
                break
            rate = (tokens + self._promised(found, size) - within) / self.cost(size)
            if rate > best:
                best, rows = rate, size
        return rows

    def _promised(self, found: Sequence[Continuations], rows: int) -> float:
        """Return how many drafts of a text should be accepted in steps of so many rows."""
        return self.trust * sum(one.expected(rows - 1) for one in found) / len(found)

    def begin(self) -> None:
        """Learn that an answer begins, which may quote more than the last."""
        self._last_step = None
        self.trust += 0.1 * (1 - self.trust)

    def after(self, kind: int | None) -> None:
        """Take in that a step is done: rows of look-up, 0 for a plain token, None for anything else."""
        if self.clock is None:
            return
        last, self._last_step = self._last_step, self.clock()
        if last is not None and kind is not None:
            self.timed(kind, self._last_step - last)

    def timed(self, kind: int, seconds: float) -> None:
        """Take in how long a step took: of so many rows of look-up, 0 for one without."""
        if kind == 0:
            if self.plain_s:
                seconds = min(seconds, LONGEST * self.plain_s)
                self.plain_s += SMOOTHING * (seconds - self.plain_s)
            else:
                self.plain_s = seconds
        elif self.plain_s:
            known = self.cost(kind)
            ratio = min(seconds / self.plain_s, LONGEST * known)
            self.ratios[kind] = known + SMOOTHING * (ratio - known)

    def accepted(self, expected: float, accepted: int) -> None:
        """Take in how many drafts of a step were accepted, and how many should have been."""
        if expected > 0:
            share = self.trust + TRUST * (accepted - self.trust * expected)
            self.trust = min(1.2, max(0.1, share))

    def pause(self) -> None:
        """Note when the caller takes over."""
        self._paused = self.clock() if self.clock is not None else 0.0

    def resume(self) -> None:
        """Do not time the step under way if the caller was long."""
        if self.clock is not None and self.clock() - self._paused > 0.5 * self.plain_s:
            self._last_step = None


def looks_up(model: StreamModel, config: DecodeConfig) -> bool:
    """Tell whether a config has drafts looked up for a model.

    Raises:
        OptionError: look-up alone was asked for where it cannot be.
    """
    if not config.looks_up:
        return False
    if config.uses_streams and (model.streams is not None or model.drafter is not None):
        return True
    if model.streams is not None and model.streams.shared:
        raise OptionError(
            "look-up alone cannot be used with streams of shared mode, which are a part of every "
            "pass; use drafts 'streams,lookup' or 'none'."
        )
    if config.tree.kind == "product":
        raise OptionError(
            f"the tree {config.tree} is made of streams' candidates; with drafts 'lookup' name a "
            "number of rows, such as 8, or 'auto'."
        )
    return True


_planners: weakref.WeakKeyDictionary[Backbone, LookUpPlanner] = weakref.WeakKeyDictionary()


def lookup_planner(model: StreamModel) -> LookUpPlanner:
    """Return a model's planner of look-up steps, made at the first call.

    Where measuring is turned off, it times nothing. Passes that fall off the fused attention plain
    decoding is on are not considered.
    """
    backbone = model.backbone
    if backbone not in _planners:
        slope = SLOPE.get(this_machine().backend, DEAR_ROWS)
        attention = fused_attention(model)
        sizes = [rows for rows in SIZES if attention is None or not attention.loses(rows)]
        clock = time.perf_counter if is_planned(None) else None
        _planners[backbone] = LookUpPlanner(slope, sizes, clock)
    return _planners[backbone]
