"""The planner: keeps the tree that pays, parks when none does, and looks again now and then.

    begin an answer ──► plan by records, costs and what earlier answers showed
    every few steps ──► move the estimate by what was accepted, plan anew
    nothing pays    ──► park: plain decoding; after a while probe with a few steps, twice as
                        long a while after every probe in vain

A while is so long that probing costs a hundredth of the time at most; where no acceptance
whatever could pay, nothing is probed. Decisions are pure arithmetic on past steps: the planner
holds no model and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_specstream.result import StepResult

from .acceptance import AcceptanceProfile
from .choose import MARGIN, Forecast, chosen, forecasts
from .curve import CostCurve
from .live import LiveAcceptance
from .plans import Plan

REVISE_AFTER = 4  # steps between two plans
PROBE_STEPS = 6
PROBE_SHARE = 0.01  # of the time, at most, goes into probing
MOST_PATIENCE = 64
HYSTERESIS = 0.02  # a new tree must beat the present one by this much
REMEMBERED = 0.8  # of earlier answers' steps, when another answer begins


@dataclass
class Planner:
    """A governor (`auto.py`) for one model, its streams and the machine; lives across answers.

    plans: those to choose from, all of the curve's if None. margin: by how much speculation must
    beat plain decoding.
    """

    curve: CostCurve
    profile: AcceptanceProfile
    plans: Sequence[Plan] | None = None
    margin: float = MARGIN
    live: LiveAcceptance = field(default_factory=LiveAcceptance)
    plan: Plan | None = None
    parked: int = 0  # plain tokens since the last step
    patience: int = 1
    context: int = 0
    _since: int = 0  # steps since the last planning
    _probing: bool = False
    _due: int | None = None  # plain tokens until a probe, None for never

    def begin(self, length: int) -> Plan | None:
        """Return the plan for an answer that follows `length` committed tokens."""
        self.live.fade(REMEMBERED)
        self.context, self._probing = length, False
        return self._replan()

    def after(self, result: StepResult, drafted_by: Plan | None, length: int) -> Plan | None:
        """Take in a step and return the plan to go on with."""
        self.context = length
        if self.plan is None:
            self.parked += 1
            if self._due is not None and self.parked >= self._due:
                self.plan, self._probing, self._since = self._best().plan, True, 0
            return self.plan
        self._since += 1
        if drafted_by is not None:
            self.live.observe(self.profile.rates(drafted_by), result.accepted)
        if self._since >= (PROBE_STEPS if self._probing else REVISE_AFTER):
            self._replan()
        return self.plan

    def parked_for(self) -> int | None:
        """Return how many more plain tokens are certain, None for any number."""
        return None if self._due is None else max(0, self._due - self.parked)

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
        return all(1 + p.depth(G) < (1 + self.margin) * self.curve.relative(p) for p in plans)

    def _replan(self) -> Plan | None:
        found = self.forecasts()
        best = chosen(found, self.margin)
        if best.plan is None:
            if self._probing:
                self.patience = min(2 * self.patience, MOST_PATIENCE)
            if self.plan is not None:
                self.parked = 0
            self._due = self._wait(found)
        else:
            if self._probing or self.plan is not None:
                self.patience = 1
            now = next((f for f in found if f.plan == self.plan is not None), None)
            if now is not None and best.speedup < (1 + HYSTERESIS) * now.speedup:
                best = now
        self.plan, self._since, self._probing = best.plan, 0, False
        return self.plan

    def _best(self) -> Forecast:
        """Return the best plan, however little it promises."""
        return next(forecast for forecast in self.forecasts() if forecast.plan is not None)

    def _wait(self, found: Sequence[Forecast]) -> int | None:
        """Return after how many plain tokens a probe is due, None for never."""
        if self.hopeless:
            return None
        best = next(forecast for forecast in found if forecast.plan is not None)
        relative = self.curve.seconds(best.plan) / self.curve.seconds(None)
        lost = self.curve.restart() - 1 + PROBE_STEPS * max(0.2, relative - best.tokens_per_step)
        return int(self.patience * lost / PROBE_SHARE)
