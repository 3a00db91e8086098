"""The planner: verifies the tree that pays, decodes plainly where none does, and probes now and then.

    begin an answer ──► a probe step, of the root alone, drafts a tree whose path probabilities say
                        what verifying it is worth; if no probe of the last answer paid, a few plain
                        tokens come first
    after a step    ──► profitable, for the tree's own sake or because the text goes well: verify
                        it, and draft with the setting that does best at this ease of the text;
                        else fall back to plain decoding
    plain decoding  ──► probe again after a while, later each time a probe does not pay

Where no acceptance whatever could pay, nothing is probed. Decisions rest on tokens that are drawn
already: nothing they do can bias what is drawn next. The planner holds no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..speculation.result import StepResult, to_float
from .acceptance import AcceptanceProfile
from .choose import MARGIN
from .correction import TimingCorrection
from .curve import CostCurve
from .settings import StepSetting

SMOOTHING = 0.3  # weight of the newest tree in the ease of the text
KEPT = 0.3  # of the ease, when another answer begins
TRUST = 0.01  # weight of one expected draft in the share of them that is accepted
GAIN = 0.3  # of a step's extra cost must be won for a tree to be verified for its own sake
SURE = 0.25  # a gain per step, in its own cost, from which on the next tree is verified unseen
PROBE_SHARE = 0.0035  # of the time goes into probe steps where they have not paid for long
FIRST = 1 / 8  # of the interval that makes probing so cheap: after the first probe
SHORT = 1 / 32  # of it: after a probe that paid
BACKOFF = 4  # intervals grow by this after a probe that did not pay, and shrink after one that did
FIRST_PROBE = 8  # plain tokens before an answer's first probe, if none of the last answer's paid
LONG = 0.5  # of a plain token's time, away from decoding, and the step meanwhile is not timed


@dataclass
class Planner:
    """A governor (`adaptive.py`) for one model, its streams and the machine; lives across answers.

    plans: those to choose from, all of the curve's if None. clock: seconds, to hold the curve
    against; None trusts it. ease: drafts expected of recent trees, in units of what was recorded.
    """

    curve: CostCurve
    profile: AcceptanceProfile
    plans: Sequence[StepSetting] | None = None
    margin: float = MARGIN
    correction: TimingCorrection = field(default_factory=TimingCorrection)
    clock: Callable[[], float] | None = None
    plan: StepSetting | None = None
    context: int = 0
    ease: float | None = None
    trust: float = 0.9  # accepted of expected drafts
    _interval: float = 0.0  # plain tokens between probes, if the next one does not pay
    _until_probe: int | None = None  # plain tokens, None for never
    _plain_tokens: int = 0  # since the last step
    _paid: bool = True  # whether a tree of this answer did
    _tree: mx.array | None = None  # drafts that the tree to verify next expects to be accepted
    _is_read: bool = False  # whether the ease has taken that in
    _last_step: float | None = None  # when it was done; None if this one is not to be timed
    _paused: float = 0.0  # when the caller took over

    def begin(self, length: int) -> StepSetting | None:
        """Return the plan for an answer that follows `length` committed tokens."""
        self.context, self.plan, self._tree, self._last_step = length, None, None, None
        self._until_probe, self._plain_tokens = None, 0
        self.correction.fade()
        if self.is_never_profitable:
            return None
        first = self._best(1.0)
        even = min(1.0, (self._cost(first) - 1) / self._recorded(first))
        self.ease = even if self.ease is None else KEPT * self.ease + (1 - KEPT) * even
        self._interval = max(FIRST * self._longest_interval(), self._interval / 2)
        if self._paid:
            self.plan = self._best(self.ease)
        else:
            self._until_probe = FIRST_PROBE
        self._paid = False
        return self.plan

    def after(
        self, result: StepResult, drafted_by: StepSetting | None, length: int
    ) -> StepSetting | None:
        """Take in a step and return the plan to go on with."""
        self.context = length
        self._time(drafted_by)
        if self.plan is None:
            self._plain_tokens += 1
            if self._until_probe is not None:
                self._until_probe -= 1
                if self._until_probe <= 0:
                    self.plan = self._best(self.ease or 0.0)
            return self.plan
        if drafted_by is not None and self._tree is not None:
            expected = to_float(self._tree)
            if not self._is_read:
                self._see(expected, drafted_by)
            if expected > 0:
                self.trust += TRUST * expected * (result.accepted / expected - self.trust)
        self._tree, self._is_read = result.expected, False
        if self._is_profitable(is_probe=drafted_by is None):
            self._paid = True
            self.plan = self._best(self.ease or 0.0)
        else:
            self._until_probe = max(1, int(self._interval))
            self._interval = min(BACKOFF * self._interval, self._longest_interval())
            self.plan, self._tree, self._plain_tokens = None, None, 0
        return self.plan

    def _is_profitable(self, *, is_probe: bool) -> bool:
        """Tell whether to verify the tree at hand, for its own sake or for what comes after it."""
        assert self.plan is not None
        assert self.ease is not None
        if self._tree is None:
            return True
        cost, worth = self._cost(self.plan), 1 + self.ease * self._recorded(self.plan)
        if not is_probe and worth >= (1 + SURE) * cost:
            return True  # reading the tree's expectation now would be waiting for the tree
        self._is_read = True
        own = 1 + self._see(to_float(self._tree), self.plan)
        if own - cost >= GAIN * (cost - 1):
            self._interval = max(SHORT * self._longest_interval(), self._interval / BACKOFF)
            return True
        return 1 + self.ease * self._recorded(self.plan) >= cost

    def _see(self, expected: float, plan: StepSetting) -> float:
        """Take in what a tree of `plan` expects of itself; return it as far as it can be trusted."""
        assert self.ease is not None
        drafts = self.trust * expected
        self.ease += SMOOTHING * (drafts / self._recorded(plan) - self.ease)
        return drafts

    def _best(self, ease: float) -> StepSetting:
        """Return the plan that yields most tokens per second in a text of this ease."""
        plans = self.curve.steps if self.plans is None else self.plans
        return max(plans, key=lambda p: (1 + ease * self._recorded(p)) / self._cost(p))

    def _recorded(self, plan: StepSetting) -> float:
        """Return the drafts accepted per step in the records, never 0."""
        return max(self.profile.tokens_per_step(plan) - 1, 0.01)

    def looked_up(self, length: int) -> None:
        """Note a step of look-up alone, which is not timed, in place of a plain one."""
        self.context, self._last_step = length, None
        if self._until_probe is not None:
            self._until_probe = max(1, self._until_probe - 1)

    def worth(self, plan: StepSetting) -> tuple[float, float]:
        """Return the tokens that a step should yield at this ease, and its price in plain tokens."""
        return 1 + (self.ease or 0.0) * self._recorded(plan), self._cost(plan)

    def plain_tokens_ahead(self) -> int | None:
        """Return how many more plain tokens are certain, None for any number."""
        return self._until_probe

    @property
    def is_never_profitable(self) -> bool:
        """Tell whether not even the acceptance of every draft would pay here."""
        G = self.curve.num_streams
        plans = self.curve.steps if self.plans is None else self.plans
        # By what was measured alone: the clock can be wrong for a while, and nothing is timed here.
        context = self.context or None
        costs = ((p, self.curve.relative(p, context)) for p in plans)
        return all(1 + p.depth(G) < (1 + self.margin) * cost for p, cost in costs)

    def _longest_interval(self) -> float:
        """Return the plain tokens between two probes that make probing as cheap as it may be."""
        return max(1.0, (self.curve.restart(self.context or None) - 1) / PROBE_SHARE)

    def _cost(self, plan: StepSetting) -> float:
        """Return a step's price in plain tokens."""
        return self.correction.factor * self.curve.relative(plan, self.context or None)

    def pause(self) -> None:
        """Note when the caller takes over."""
        if self.clock is not None:
            self._paused = self.clock()

    def resume(self) -> None:
        """Do not time the step under way if the caller was long: a slow reader, or another's turn."""
        if self.clock is not None and self.clock() - self._paused > LONG * self.curve.plain.seconds:
            self._last_step = None

    def _time(self, drafted_by: StepSetting | None) -> None:
        """Hold the seconds since the last step against what they should be, if it was of the same kind."""
        if self.clock is None:
            return
        last, self._last_step = self._last_step, self.clock()
        expected = self.curve.seconds(drafted_by, self.context)
        if drafted_by is not None:
            if last is not None:
                self.correction.step(self._last_step - last, expected)
        elif self.plan is not None:  # a probe step, which has a price of its own
            return
        elif (
            last is not None and self._plain_tokens
        ):  # the first one waits for the pipeline to fill
            self.correction.plain(self._last_step - last, expected)
