"""Measuring a cost curve: real steps, each depending on the last, in turn with plain decoding.

Plain decoding is timed before and after every few steps, and a step counts as a multiple of that:
a clock that drifts, or another program's load, hits both sides. Plans that cannot win any more are
dropped, and most are never begun where time is short: the first few tell enough of the others.
How costs grow with the context is measured for plain decoding and for a narrow and a wide plan,
since attention may cost by the row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..errors import ModelError
from ..speculation.streams import Streams
from .curve import BUDGET_S, CostCurve, Growth, StepCost
from .settings import StepSetting
from .timing import PlainTokens, Steps

CONTEXT = 256
LONG_CONTEXT = 2048
MAX_ROUNDS = 7
STEPS = 2  # of a plan per sample
RESTARTS = 3  # samples of a step of the root alone
GROUP = 3  # plans between two samples of plain decoding
UNPROFITABLE = 0.8  # of the best plan's tokens per second: plans below are dropped
_EXPLORING = 0.5  # share of the budget in which plans are still begun

Yield = Callable[[StepSetting], float]


def measure(
    streams: Streams,
    plans: Sequence[StepSetting],
    *,
    budget_s: float = BUDGET_S,
    tokens_per_step: Yield | None = None,
    clock: Callable[[], float] = time.perf_counter,
    context: int = CONTEXT,
) -> CostCurve | None:
    """Return the costs of plain decoding and of those of `plans` that matter and fit the budget.

    None if the model computes NaN, or nothing was measured.

    Args:
        plans: in the order in which they are begun.
        budget_s: seconds after which no sample begins.
        tokens_per_step: what plans are expected to yield, to tell which of them matter.
        clock: seconds; tests bring their own.
    """
    session = _Session(streams, clock, context, clock() + budget_s, tokens_per_step)
    try:
        session.explore(plans, clock() + _EXPLORING * budget_s)
        restart = session.restart()
        growth = session.growth() if budget_s >= 1 else Growth()
        session.refine()
    except ModelError:
        return None
    if not session.ratios:
        return None
    curve = session.curve(growth)
    return replace(curve, restart_s=restart * curve.plain.seconds)


@dataclass
class _Session:
    """One measurement under way. ratios: samples of each plan, in plain tokens."""

    streams: Streams
    clock: Callable[[], float]
    context: int
    until: float
    tokens_per_step: Yield | None
    plain: list[float] = field(default_factory=list)
    ratios: dict[StepSetting, list[float]] = field(default_factory=dict)
    dropped: dict[StepSetting, list[float]] = field(default_factory=dict)
    steps: dict[StepSetting, Steps] = field(default_factory=dict)
    complete: bool = True

    def explore(self, plans: Sequence[StepSetting], until: float) -> None:
        """Take a first sample of each plan that could matter."""
        token = PlainTokens(self.streams.backbone, self.streams, self.clock)
        token.sample(self.context)  # warms up
        self.token = token
        before = token.sample(self.context)
        self.plain.append(before)
        waiting: list[StepSetting] = []
        for plan in plans:
            if self.ratios and not self._matters(plan):
                continue
            if (self.ratios or waiting) and self.clock() > until:
                self.complete = False
                break
            self.steps[plan] = steps = Steps(self.streams, plan, self.clock)
            steps.sample(self.context, 1)  # warms up
            waiting.append(plan)
            if len(waiting) == 2 or not self.ratios:
                before, waiting = self._sample(waiting, before, 1), []
        if waiting:
            self._sample(waiting, before, 1)

    def refine(self) -> None:
        """Take more samples of the plans that are still in the race, in rounds."""
        for turn in range(MAX_ROUNDS - 1):
            self._drop()
            if turn >= 2 and self._none_pays():
                return
            before = self.plain[-1]
            alive = list(self.ratios)
            for first in range(0, len(alive), GROUP):
                if self.clock() > self.until:
                    return
                before = self._sample(alive[first : first + GROUP], before)

    def restart(self) -> float:
        """Return what a step of the root alone costs in plain tokens, 0 if time is up."""
        if not self.ratios or self.clock() > self.until:
            return 0.0
        steps, ratios = next(iter(self.steps.values())), []
        for _ in range(RESTARTS):
            seconds = steps.restart(self.context)
            after = self.token.sample(self.context)
            ratios.append(seconds / (0.5 * (self.plain[-1] + after)))
            self.plain.append(after)
        return statistics.median(ratios)

    def growth(self) -> Growth:
        """Return how much more time tokens and steps take per token of context.

        Each is timed at the long context as a multiple of plain tokens at the short one.
        """
        self._drop()
        if self._none_pays() or self.clock() > self.until:
            return Growth()
        G, token = self.streams.num_streams, statistics.median(self.plain)
        near = {plan: statistics.median(found) for plan, found in self.ratios.items()}
        alike = [plan for plan in near if plan.schedule == next(iter(near)).schedule]
        narrow, wide = (extreme(alike, key=lambda p: p.rows(G)) for extreme in (min, max))
        before = self.token.sample(self.context)
        self.token.sample(LONG_CONTEXT)  # warms up
        plain = [self.token.sample(LONG_CONTEXT)]
        far: dict[StepSetting, float] = {}
        for plan in dict.fromkeys((narrow, wide)):
            if far and self.clock() + 2 * (1 + STEPS) * near[plan] * token > self.until:
                break
            self.steps[plan].sample(LONG_CONTEXT, 1)  # warms up
            far[plan] = self.steps[plan].sample(LONG_CONTEXT, STEPS)
        plain.append(self.token.sample(LONG_CONTEXT))
        now = 0.5 * (before + self.token.sample(self.context))
        per_token = token / (LONG_CONTEXT - self.context)
        return Growth.through(
            (statistics.mean(plain) / now - 1) * per_token,
            {plan.rows(G): (far[plan] / now - near[plan]) * per_token for plan in far},
        )

    def curve(self, growth: Growth | None = None) -> CostCurve:
        """Return what was found."""
        token = statistics.median(self.plain)
        every = {**self.dropped, **self.ratios}
        return CostCurve(
            num_streams=self.streams.num_streams,
            context=self.context,
            plain=StepCost(token, _spread(self.plain), len(self.plain)),
            steps={
                plan: StepCost(token * statistics.median(found), _spread(found), len(found))
                for plan, found in every.items()
            },
            growth=growth or Growth(),
            complete=self.complete,
        )

    def _sample(self, plans: Sequence[StepSetting], before: float, number: int = STEPS) -> float:
        """Sample `number` steps of each plan, then plain decoding, whose seconds are returned."""
        times = [self.steps[plan].sample(self.context, number) for plan in plans]
        after = self.token.sample(self.context)
        self.plain.append(after)
        for plan, seconds in zip(plans, times, strict=True):
            self.ratios.setdefault(plan, []).append(seconds / (0.5 * (before + after)))
        return after

    def _speed(self, plan: StepSetting, ratio: float) -> float:
        return 0.0 if self.tokens_per_step is None else self.tokens_per_step(plan) / ratio

    def _best(self) -> float:
        return max(self._speed(plan, statistics.median(r)) for plan, r in self.ratios.items())

    def _matters(self, plan: StepSetting) -> bool:
        """Tell whether a plan not begun could pay, and come near the best, going by its neighbours."""
        known = self.curve()
        guess, G = known.relative(plan), self.streams.num_streams
        widest = max(other.rows(G) for other in known.steps)
        if plan.rows(G) > widest:  # the curve says in proportion to rows, which is the worst case
            guess *= (widest / plan.rows(G)) ** 0.5
        guess *= 0.9  # it is a guess
        if 1 + plan.depth(G) < guess:
            return False
        return (
            self.tokens_per_step is None or self._speed(plan, guess) >= UNPROFITABLE * self._best()
        )

    def _none_pays(self) -> bool:
        """Tell whether no plan gains even if every draft is accepted, by a wide margin."""
        G = self.streams.num_streams
        return all(
            1 + plan.depth(G) < 0.8 * statistics.median(found)
            for plan, found in self.ratios.items()
        )

    def _drop(self) -> None:
        best = self._best()
        for plan, found in list(self.ratios.items()):
            if self._speed(plan, statistics.median(found)) < UNPROFITABLE * best:
                self.dropped[plan] = self.ratios.pop(plan)


def _spread(samples: Sequence[float]) -> float:
    """Return half the interquartile range over the median, 0 for fewer than two samples."""
    if len(samples) < 2:
        return 0.0
    quartiles = statistics.quantiles(samples, n=4)
    return (quartiles[2] - quartiles[0]) / 2 / statistics.median(samples)
