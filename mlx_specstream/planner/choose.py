"""Which plan pays best: expected tokens per step over seconds per step, plain decoding included."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .acceptance import AcceptanceProfile
from .curve import CostCurve
from .settings import StepSetting

MARGIN = 0.03
"""Speculation must promise this much over plain decoding, for restarts and for what is unsure."""


@dataclass(frozen=True)
class Forecast:
    """What a plan promises. plan: None is plain decoding. speedup: over plain decoding."""

    plan: StepSetting | None
    tokens_per_step: float
    seconds_per_step: float
    speedup: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.seconds_per_step

    @property
    def name(self) -> str:
        return "plain" if self.plan is None else self.plan.name


def forecasts(
    curve: CostCurve,
    profile: AcceptanceProfile,
    *,
    plans: Iterable[StepSetting] | None = None,
    context: int | None = None,
) -> list[Forecast]:
    """Return a forecast for plain decoding and each plan, the fastest first.

    Args:
        plans: which; None for all that the curve holds.
        context: committed tokens; None for the curve's own.
    """
    token = curve.seconds(None, context)
    found = [Forecast(None, 1.0, token, 1.0)]
    for plan in curve.steps if plans is None else plans:
        tokens, seconds = profile.tokens_per_step(plan), curve.seconds(plan, context)
        found.append(Forecast(plan, tokens, seconds, tokens * token / seconds))
    return sorted(found, key=lambda forecast: -forecast.speedup)


def chosen(found: Iterable[Forecast], margin: float = MARGIN) -> Forecast:
    """Return the fastest forecast, plain decoding unless one beats it by `margin`."""
    ranked = sorted(found, key=lambda forecast: -forecast.speedup)
    plain = next(forecast for forecast in ranked if forecast.plan is None)
    return ranked[0] if ranked[0].speedup >= 1 + margin else plain
