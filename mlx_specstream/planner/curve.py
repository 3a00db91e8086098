"""A cost curve: seconds per step for each plan, beside one token of plain decoding.

Plans are priced whole, as decoding runs them (layers, heads, drafting, the host's share), since
kernels have steps at odd row counts that no formula knows. What was not measured lies between
its neighbours in rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from .settings import StepSetting

BUDGET_S = 10.0
"""Seconds that measuring a curve may take, unless something else is said."""


@dataclass(frozen=True)
class StepCost:
    """What a step costs at the curve's context.

    seconds: the median. spread: half the interquartile range over the median. samples: how many
    steps were timed, 0 where the figure is derived.
    """

    seconds: float
    spread: float = 0.0
    samples: int = 0


@dataclass(frozen=True)
class Growth:
    """Seconds more per token of context: of a plain token, of a step, and per row of the step.

    Where attention reads keys and values once for all rows, `row_s` is near 0; where it costs by
    the row, `step_s` is.
    """

    plain_s: float = 0.0
    step_s: float = 0.0
    row_s: float = 0.0

    @classmethod
    def through(cls, plain_s: float, steps: Mapping[int, float]) -> Growth:
        """Return the growth that was seen in a plain token and in steps of some row counts.

        Of one row count alone it is taken to be by the row, beyond a plain token's. Time does not
        shrink with the context: what seems so is noise.
        """
        plain_s = max(0.0, plain_s)
        points = [(1, plain_s), *sorted(steps.items())][-2:]
        (narrow, low), (wide, high) = points[0], points[-1]
        low = max(0.0, low)
        high = max(low, high)
        row_s = (high - low) / (wide - narrow) if wide > narrow else 0.0
        row_s = min(row_s, high / wide)  # no less than nothing for no rows
        return cls(plain_s, high - row_s * wide, row_s)

    def of(self, rows: int) -> float:
        """Return the growth of a step of so many rows."""
        return self.step_s + self.row_s * rows


@dataclass(frozen=True)
class CostCurve:
    """Costs of plain decoding and of plans, for one model with its streams on one machine.

    context: committed tokens at which it holds. growth: what further ones cost. restart_s: seconds
    of a step of the root alone, which drafts anew; 0 if not measured. source: `measured`, or where
    the figures come from. key: what they hold for (`identity.py`). complete: False if time was up
    before every plan that matters was begun. busy: other programs ran meanwhile. message_s: what a
    message between processes took then, 0 for one process.
    """

    num_streams: int
    context: int
    plain: StepCost
    steps: Mapping[StepSetting, StepCost]
    growth: Growth = Growth()
    restart_s: float = 0.0
    source: str = "measured"
    key: Mapping[str, object] = field(default_factory=dict)
    complete: bool = True
    busy: bool = False
    message_s: float = 0.0

    def seconds(self, plan: StepSetting | None, context: int | None = None) -> float:
        """Return the seconds of a step (None: of one token of plain decoding) at a context."""
        more = 0 if context is None else context - self.context
        if plan is None:
            return max(self.plain.seconds + more * self.growth.plain_s, 1e-9)
        growth = self.growth.of(plan.rows(self.num_streams))
        return max(self._base(plan) + more * growth, 1e-9)

    def relative(self, plan: StepSetting, context: int | None = None) -> float:
        """Return what a step costs in tokens of plain decoding."""
        return self.seconds(plan, context) / self.seconds(None, context)

    def restart(self, context: int | None = None) -> float:
        """Return what a step of the root alone costs in plain tokens: it drafts anew.

        At most what the cheapest step costs, if it was not measured.
        """
        cheapest = min((cost.seconds for cost in self.steps.values()), default=0.0)
        more = 0 if context is None else context - self.context
        seconds = (self.restart_s or cheapest) + more * self.growth.of(1)
        return max(1.0, seconds / self.seconds(None, context))

    def _base(self, plan: StepSetting) -> float:
        """Return the cost of a plan, between those of its neighbours if it was not measured."""
        if plan in self.steps:
            return self.steps[plan].seconds
        rows = plan.rows(self.num_streams)
        alike = [known for known in self.steps if _alike(known, plan, strictly=True)]
        alike = alike or [known for known in self.steps if _alike(known, plan, strictly=False)]
        alike = alike or list(self.steps)
        if not alike:
            return self.plain.seconds * rows
        points = sorted(
            (known.rows(self.num_streams), self.steps[known].seconds) for known in alike
        )
        below = [point for point in points if point[0] <= rows]
        above = [point for point in points if point[0] >= rows]
        if not below:
            return above[0][1]
        if not above:  # never cheaper than in proportion to the widest that is known
            return below[-1][1] * max(1.0, rows / max(1, below[-1][0]))
        (low, cheap), (high, dear) = below[-1], above[0]
        return cheap if high == low else cheap + (dear - cheap) * (rows - low) / (high - low)

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "num_streams": self.num_streams,
            "context": self.context,
            "source": self.source,
            "key": dict(self.key),
            "complete": self.complete,
            "busy": self.busy,
            "message_s": round(self.message_s, 7),
            "plain": _cost(self.plain),
            "growth": asdict(self.growth),
            "restart_s": self.restart_s,
            "steps": {plan.name: _cost(cost) for plan, cost in self.steps.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> CostCurve:
        """Make one from its JSON form.

        Raises:
            ValueError, KeyError, TypeError, OptionError: it is damaged.
        """
        steps, key, growth = values["steps"], values["key"], values["growth"]
        if not isinstance(steps, dict) or not isinstance(key, dict) or not isinstance(growth, dict):
            raise TypeError("steps, key and growth must be objects")
        return cls(
            num_streams=int(_number(values["num_streams"])),
            context=int(_number(values["context"])),
            plain=_read_cost(values["plain"]),
            steps={StepSetting.parse(str(name)): _read_cost(cost) for name, cost in steps.items()},
            growth=Growth(*(_number(growth[name]) for name in ("plain_s", "step_s", "row_s"))),
            restart_s=_number(values.get("restart_s", 0.0)),
            source=str(values["source"]),
            key=key,
            complete=values.get("complete", True) is True,
            busy=values.get("busy", False) is True,
            message_s=_number(values.get("message_s", 0.0)),
        )


def _alike(known: StepSetting, plan: StepSetting, *, strictly: bool) -> bool:
    if (known.schedule, known.prune, known.stream_nodes) != (
        plan.schedule,
        plan.prune,
        plan.stream_nodes,
    ):
        return False
    return not strictly or (known.tree.kind == "chain") == (plan.tree.kind == "chain")


def _cost(cost: StepCost) -> dict[str, float]:
    return {
        "seconds": round(cost.seconds, 7),
        "spread": round(cost.spread, 4),
        "samples": cost.samples,
    }


def _read_cost(values: object) -> StepCost:
    if not isinstance(values, dict):
        raise TypeError("a cost must be an object")
    seconds = _number(values["seconds"])
    if not 0 < seconds < 3600:
        raise ValueError(f"a step of {seconds} seconds")
    return StepCost(seconds, _number(values["spread"]), int(_number(values["samples"])))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise TypeError(f"{value!r} is not a number")
    return float(value)
