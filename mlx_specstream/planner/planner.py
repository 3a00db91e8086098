"""The planner: keeps the tree that pays, decodes plainly where none does, and looks again.

    begin an answer ──► a step of the root alone drafts a tree, whose probabilities tell what
                        verifying it is worth; if all looks of the last answer were in vain,
                        a few plain tokens come first
    after a step    ──► worth it, or the text as a whole is: verify, with the plan that records
                        and recent steps favour; else park
    parked          ──► plain decoding; after a while look again, with one step of the root, and
                        wait longer after a look in vain

Looks in vain cost less than a hundredth of the time in the long run; where no acceptance whatever could
pay, none is taken. Decisions rest on tokens that are drawn already: nothing they do can bias what
is drawn next. The planner holds no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..speculation.result import StepResult, to_float
from .acceptance import AcceptanceProfile
from .choose import MARGIN, Forecast, forecasts
from .curve import CostCurve
from .live import LiveAcceptance
from .outlook import Outlook
from .pace import Pace
from .settings import Plan

REVISE_AFTER = 4  # steps between two plans
LOOK_SHARE = 0.007  # of the time goes into looking again when that is in vain for long
FIRST_WAIT = 3 / 4  # of the longest wait between two looks
SHORT_WAIT = 1 / 8  # of it, in an answer in which looks were worth it
IMPATIENCE = 4  # waits grow by this
HYSTERESIS = 0.02  # a new tree must beat the present one by this much
REMEMBERED = 0.8  # of earlier answers' steps, when another answer begins
LATE = 8  # plain tokens before the first look of an answer, if the last one's were in vain
GAIN = 0.15  # of a step's extra cost must be won for a tree to be verified for its own sake
LONG = 0.5  # of a plain token's time, away from decoding, and the step meanwhile is not timed
SURE = 0.25  # a gain per step, in its own cost, at which nobody waits for the next tree


@dataclass
class Planner:
    """A governor (`auto.py`) for one model, its streams and the machine; lives across answers.

    plans: those to choose from, all of the curve's if None. margin: by how much speculation must
    beat plain decoding at best. clock: seconds, to hold the curve against; None trusts it.
    """

    curve: CostCurve
    profile: AcceptanceProfile
    plans: Sequence[Plan] | None = None
    margin: float = MARGIN
    live: LiveAcceptance = field(default_factory=LiveAcceptance)
    outlook: Outlook = field(default_factory=Outlook)
    pace: Pace = field(default_factory=Pace)
    clock: Callable[[], float] | None = None
    plan: Plan | None = None
    parked: int = 0  # plain tokens since the last step
    context: int = 0
    _since: int = 0  # steps since the last planning
    _wait: float = 0.0  # plain tokens for which parking is worth it, as looks have shown
    _vain: bool = False  # whether no look of this answer was worth it so far
    _due: int | None = None  # plain tokens until the next look, None for never
    _tree: mx.array | None = None  # what the tree at hand expects
    _seen: bool = False  # whether the outlook has taken that in
    _then: float | None = None  # when the last step was done, None if this one is not to be timed
    _paused: float = 0.0  # when the caller took over

    def begin(self, length: int) -> Plan | None:
        """Return the plan for an answer that follows `length` committed tokens."""
        self.live.fade(REMEMBERED)
        self.pace.fade()
        self.context, self._tree, self.plan, self._due = length, None, None, None
        self._then = None
        if self.hopeless:
            return None
        best = self._best()
        assert best.plan is not None
        self.plan, self._since = best.plan, 0
        self._wait = max(FIRST_WAIT * self._longest_wait(), self._wait / 2)
        breaks_even = self._cost(best.plan) - 1
        recorded = self.profile.tokens_per_step(best.plan) - 1
        self.outlook.begin(min(breaks_even, recorded))
        if self._vain:
            self.plan, self.parked, self._due = None, 0, LATE
        self._vain = True
        return self.plan

    def after(self, result: StepResult, drafted_by: Plan | None, length: int) -> Plan | None:
        """Take in a step and return the plan to go on with."""
        self.context = length
        self._time(drafted_by)
        if self.plan is None:
            self.parked += 1
            if self._due is not None and self.parked >= self._due:
                self.plan, self._since = self._best().plan, 0
            return self.plan
        if drafted_by is not None:
            self.live.observe(self.profile.rates(drafted_by), result.accepted)
            self._judge(result.accepted)
        if self._worth_it(result, looking=drafted_by is None):
            self._vain = False
            self._revise()
        else:
            self._park()
        return self.plan

    def parked_for(self) -> int | None:
        """Return how many more plain tokens are certain, None for any number."""
        return None if self._due is None else max(0, self._due - self.parked)

    def pause(self) -> None:
        """Note when the caller takes over."""
        if self.clock is not None:
            self._paused = self.clock()

    def resume(self) -> None:
        """Do not time the step under way if the caller was long: a slow reader, or another's turn."""
        if self.clock is not None and self.clock() - self._paused > LONG * self.curve.plain.seconds:
            self._then = None

    def forecasts(self) -> list[Forecast]:
        """Return what every plan promises for the text at hand, the fastest first."""
        return forecasts(
            self.curve,
            self.profile,
            plans=self.plans,
            context=self.context or None,
            shift=self.live.shift(),
        )

    @property
    def hopeless(self) -> bool:
        """Tell whether not even the acceptance of every draft would pay here."""
        G = self.curve.num_streams
        plans = self.curve.steps if self.plans is None else self.plans
        # By what was measured alone: the clock can be wrong for a while, and nothing is timed here.
        context = self.context or None
        costs = ((p, self.curve.relative(p, context)) for p in plans)
        return all(1 + p.depth(G) < (1 + self.margin) * cost for p, cost in costs)

    def _time(self, drafted_by: Plan | None) -> None:
        """Hold the seconds since the last step against what they should be, if it was of the same kind."""
        if self.clock is None:
            return
        then, self._then = self._then, self.clock()
        expected = self.curve.seconds(drafted_by, self.context)
        if drafted_by is not None:
            if then is not None:
                self.pace.step(self._then - then, expected)
        elif self.plan is not None:  # a look, which has a price of its own
            return
        elif then is not None and self.parked:  # the first token waits for the pipeline to fill
            self.pace.plain(self._then - then, expected)

    def _judge(self, accepted: int) -> None:
        """Compare what the verified tree expected with what was accepted of it."""
        if self._tree is not None:
            expected = to_float(self._tree)
            if not self._seen:
                self.outlook.see(expected)
            self.outlook.verified(expected, accepted)

    def _worth_it(self, result: StepResult, *, looking: bool) -> bool:
        """Tell whether to verify the next tree, for its own sake or for what comes after it."""
        assert self.plan is not None
        assert self.outlook.level is not None
        self._tree, self._seen = result.expected, False
        if self._tree is None:
            return True
        cost = self._cost(self.plan)
        if not looking and 1 + self.outlook.level >= (1 + SURE) * cost:
            return True  # reading the tree's expectation now would be waiting for the tree
        self._seen = True
        worth = 1 + self.outlook.see(to_float(self._tree)) - cost
        if worth >= GAIN * (cost - 1):
            self._wait = max(SHORT_WAIT * self._longest_wait(), self._wait / IMPATIENCE)
            return True
        # A poor tree in good text: verifying it is still cheaper than drafting another.
        return 1 + self.outlook.level >= cost and worth > 1 - self._look_cost()

    def _revise(self) -> None:
        """Every few steps, take the plan that does best by now."""
        self._since += 1
        if self._since < REVISE_AFTER:
            return
        found = [forecast for forecast in self.forecasts() if forecast.plan is not None]
        now = next((f for f in found if f.plan == self.plan), None)
        if now is None or found[0].speedup >= (1 + HYSTERESIS) * now.speedup:
            self.plan = found[0].plan
        self._since = 0

    def _park(self) -> None:
        self._due = max(1, int(self._wait))
        self._wait = min(IMPATIENCE * self._wait, self._longest_wait())
        self.plan, self.parked, self._tree = None, 0, None

    def _longest_wait(self) -> float:
        """Return the plain tokens between two looks that make looking as cheap as it may be."""
        return max(1.0, (self._look_cost() - 1) / LOOK_SHARE)

    def _look_cost(self) -> float:
        """Return the price in plain tokens of a step of the root alone."""
        return self.curve.restart(self.context or None)

    def _cost(self, plan: Plan) -> float:
        """Return a step's price in plain tokens."""
        return self.pace.factor * self.curve.relative(plan, self.context or None)

    def _best(self) -> Forecast:
        """Return the best plan, however little it promises."""
        return next(forecast for forecast in self.forecasts() if forecast.plan is not None)
