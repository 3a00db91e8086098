"""Measuring a cost curve: real steps, each depending on the last, in turn with plain decoding.

A cache of zeros stands in for committed text, so nothing has to be read first; what the model
says there is nonsense, but it costs the same. Plain decoding is timed before and after every few
steps, and a step counts as a multiple of that: a clock that drifts, or another program's load,
hits both sides. Plans that cannot win any more are dropped, and most are never begun where time
is short: the first few tell enough of the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from mlx_specstream.baseline import PlainDecoder, plain_decoder
from mlx_specstream.cache import KVCache
from mlx_specstream.config import DecodeConfig
from mlx_specstream.decode import StreamDecoder
from mlx_specstream.errors import ModelError
from mlx_specstream.result import StepResult
from mlx_specstream.sampling import TokenChooser
from mlx_specstream.streams import Streams
from mlx_specstream.tree import DraftTree, root_only

from .curve import CostCurve, StepCost
from .plans import Plan

BUDGET_S = 8.0
CONTEXT = 256
LONG_CONTEXT = 2048
MAX_ROUNDS = 7
STEPS = 2  # of a plan per sample
TOKENS = 3  # of plain decoding per sample
RESTARTS = 3  # samples of a step of the root alone
GROUP = 3  # plans between two samples of plain decoding
HOPELESS = 0.8  # of the best plan's tokens per second: plans below are dropped
_EXPLORING = 0.6  # share of the budget in which plans are still begun

Yield = Callable[[Plan], float]


def measure(
    streams: Streams,
    plans: Sequence[Plan],
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
        session.refine()
        growth = session.growth() if budget_s >= 1 else (0.0, 0.0)
    except ModelError:
        return None
    if not session.ratios:
        return None
    curve = session.curve(*growth)
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
    ratios: dict[Plan, list[float]] = field(default_factory=dict)
    dropped: dict[Plan, list[float]] = field(default_factory=dict)
    steps: dict[Plan, _Steps] = field(default_factory=dict)
    complete: bool = True

    def explore(self, plans: Sequence[Plan], until: float) -> None:
        """Take a first sample of each plan that could matter."""
        token = _PlainTokens(self.streams, self.clock)
        token.sample(self.context)  # warms up
        self.token = token
        before = token.sample(self.context)
        self.plain.append(before)
        waiting: list[Plan] = []
        for plan in plans:
            if self.ratios and not self._matters(plan):
                continue
            if (self.ratios or waiting) and self.clock() > until:
                self.complete = False
                break
            self.steps[plan] = steps = _Steps(self.streams, plan, self.clock)
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

    def growth(self) -> tuple[float, float]:
        """Return the seconds that a plain token and a step cost more per token of context."""
        if self.clock() > self.until:
            return 0.0, 0.0
        plan = min(self.ratios, key=lambda p: statistics.median(self.ratios[p]))
        more = LONG_CONTEXT - self.context
        found = []
        for timed, now in (
            (lambda at: self.token.sample(at), self.plain),
            (lambda at: self.steps[plan].sample(at, STEPS), None),
        ):
            timed(LONG_CONTEXT)  # warms up
            near, far = timed(self.context), timed(LONG_CONTEXT)
            near = near if now is None else min(near, statistics.median(now))
            found.append(max(0.0, far - near) / more)
        return found[0], found[1]

    def curve(self, plain_growth_s: float, step_growth_s: float) -> CostCurve:
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
            plain_growth_s=plain_growth_s,
            step_growth_s=step_growth_s,
            complete=self.complete,
        )

    def _sample(self, plans: Sequence[Plan], before: float, number: int = STEPS) -> float:
        """Sample `number` steps of each plan, then plain decoding, whose seconds are returned."""
        times = [self.steps[plan].sample(self.context, number) for plan in plans]
        after = self.token.sample(self.context)
        self.plain.append(after)
        for plan, seconds in zip(plans, times, strict=True):
            self.ratios.setdefault(plan, []).append(seconds / (0.5 * (before + after)))
        return after

    def _speed(self, plan: Plan, ratio: float) -> float:
        return 0.0 if self.tokens_per_step is None else self.tokens_per_step(plan) / ratio

    def _best(self) -> float:
        return max(self._speed(plan, statistics.median(r)) for plan, r in self.ratios.items())

    def _matters(self, plan: Plan) -> bool:
        """Tell whether a plan not begun could pay, and come near the best, going by its neighbours."""
        known = self.curve(0.0, 0.0)
        guess, G = known.relative(plan), self.streams.num_streams
        widest = max(other.rows(G) for other in known.steps)
        if plan.rows(G) > widest:  # the curve says in proportion to rows, which is the worst case
            guess *= (widest / plan.rows(G)) ** 0.5
        guess *= 0.9  # it is a guess
        if 1 + plan.depth(G) < guess:
            return False
        return self.tokens_per_step is None or self._speed(plan, guess) >= HOPELESS * self._best()

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
            if self._speed(plan, statistics.median(found)) < HOPELESS * best:
                self.dropped[plan] = self.ratios.pop(plan)


class _PlainTokens:
    """Plain decoding at a fixed context, pipelined as it really runs."""

    def __init__(self, streams: Streams, clock: Callable[[], float]) -> None:
        self.decoder = plain_decoder(streams.backbone, streams, TokenChooser())
        self.caches = _Caches(streams)
        self.clock = clock

    def sample(self, context: int) -> float:
        """Return the seconds of a token, on average over a pipelined run.

        Timed from an idle device to an idle device: a result alone tells little, since scheduling
        the pass after it may take until most of that is computed.
        """
        cache = self.caches.at(context)
        self.decoder.chooser.history.clear()
        left = TOKENS

        def more(_: StepResult) -> bool:
            nonlocal left
            left -= 1
            return left > 0

        # The last pass is known to be the last, so that none runs on into the next sample.
        steps: Iterator[StepResult] = (
            self.decoder.steps(_TOKEN, cache, more, lambda: left > 1)
            if isinstance(self.decoder, PlainDecoder)
            else self.decoder.steps(_TOKEN, cache, more)
        )
        mx.synchronize()
        begin = self.clock()
        for _ in steps:
            pass
        mx.synchronize()
        return (self.clock() - begin) / TOKENS


class _Steps:
    """Dependent steps with one plan at a fixed context."""

    def __init__(self, streams: Streams, plan: Plan, clock: Callable[[], float]) -> None:
        self.decoder = StreamDecoder(streams, plan.config(DecodeConfig()), TokenChooser())
        self.caches = _Caches(streams)
        self.clock = clock
        self.tree: DraftTree | None = None

    def sample(self, context: int, number: int) -> float:
        """Return the seconds of a step, on average over `number` of them."""
        cache = self.caches.at(context)
        if self.tree is None:
            self.tree = self._step(root_only(mx.array([_TOKEN])), cache)
        begin = self.clock()
        for _ in range(number):
            self.tree = self._step(self.tree, cache)
        # Only now is the last step's draft complete; in a loop the next step would wait for it.
        mx.eval(self.tree.arrays)
        return (self.clock() - begin) / number

    def restart(self, context: int) -> float:
        """Return the seconds of a step of the root alone."""
        cache = self.caches.at(context)
        begin = self.clock()
        mx.eval(self._step(root_only(mx.array([_TOKEN])), cache).arrays)
        return self.clock() - begin

    def _step(self, tree: DraftTree, cache: KVCache) -> DraftTree:
        self.decoder.chooser.history.clear()
        step = self.decoder.stepper.step(tree, cache)
        step.schedule()
        tree = step.next_tree  # also where the path ends without streams: it costs the same
        self.decoder.finish(step, cache)
        return tree


class _Caches:
    """A KV cache whose committed text is nothing but zeros, rewound for every sample."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.made: dict[int, KVCache] = {}

    def at(self, context: int) -> KVCache:
        if context not in self.made:
            cache = KVCache(self.streams.backbone.num_layers)
            # A row at the far end makes buffers of zeros before it.
            cache.length = context
            self.streams.forward(mx.array([_TOKEN]), cache)
            mx.eval(cache.arrays)
            self.made = {context: cache}  # one at a time: long ones are large
        cache = self.made[context]
        cache.rewind(context)
        return cache


_TOKEN = 1


def _spread(samples: Sequence[float]) -> float:
    """Return half the interquartile range over the median, 0 for fewer than two samples."""
    if len(samples) < 2:
        return 0.0
    quartiles = statistics.quantiles(samples, n=4)
    return (quartiles[2] - quartiles[0]) / 2 / statistics.median(samples)
