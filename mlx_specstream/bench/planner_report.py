"""What the planner knows, for people and as JSON: costs, forecasts, the choice and why; a check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..planner.acceptance import AcceptanceProfile
from ..planner.choose import MARGIN, Forecast, chosen
from ..planner.curve import CostCurve
from ..planner.settings import StepSetting

if TYPE_CHECKING:
    from rich.console import Console

    from .planner_check import PlannerCheck


def as_json(
    curve: CostCurve, profile: AcceptanceProfile, found: list[Forecast]
) -> dict[str, object]:
    """Return curve, forecasts and choice in the form of JSON."""
    return {
        "costs": curve.to_dict(),
        "acceptance": {"source": profile.source, "tasks": profile.tasks},
        "forecasts": [
            {
                "plan": forecast.name,
                "tokens_per_step": round(forecast.tokens_per_step, 3),
                "ms_per_step": round(1e3 * forecast.seconds_per_step, 3),
                "tokens_per_s": round(forecast.tokens_per_s, 2),
                "speedup": round(forecast.speedup, 3),
            }
            for forecast in found
        ],
        "margin": MARGIN,
        "choice": chosen(found).name,
    }


def show(
    console: Console, curve: CostCurve, profile: AcceptanceProfile, found: list[Forecast]
) -> None:
    """Print a table of plans, fastest first, and the choice with its reason."""
    from rich.table import Table

    choice = chosen(found)
    table = Table(title="Plans, the fastest first")
    for heading in ("plan", "rows", "ms per step", "in tokens", "tokens per step", "speed-up"):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    for forecast in found:
        cost = curve.plain if forecast.plan is None else curve.steps[forecast.plan]
        rows = 1 if forecast.plan is None else forecast.plan.rows(curve.num_streams)
        mark = " <" if forecast == choice else ""
        table.add_row(
            forecast.name + mark,
            str(rows),
            f"{1e3 * forecast.seconds_per_step:.1f} ± {100 * cost.spread:.0f} %",
            f"{forecast.seconds_per_step / curve.seconds(None, curve.context):.2f}",
            f"{forecast.tokens_per_step:.2f}",
            f"{forecast.speedup:.2f}",
            style="bold" if forecast == choice else None,
        )
    console.print(table)
    console.print(reason(curve, profile, found), soft_wrap=True, highlight=False)


def reason(curve: CostCurve, profile: AcceptanceProfile, found: list[Forecast]) -> str:
    """Say in a line or two what is chosen and why."""
    choice = chosen(found)
    best = next(forecast for forecast in found if forecast.plan is not None)
    price = best.seconds_per_step / plain_forecast(found).seconds_per_step
    facts = (
        f"a step costs {price:.2f} plain tokens and yields {best.tokens_per_step:.2f} "
        f"(acceptance: {profile.source or 'recorded'}; costs: {curve.source})"
    )
    if choice.plan is None:
        return (
            f"Chosen: plain decoding. The best tree, {best.name}, promises {best.speedup:.2f}x, less "
            f"than the {1 + MARGIN:.2f}x at which speculation begins: {facts}."
        )
    return f"Chosen: {choice.name}, {choice.speedup:.2f}x plain decoding: {facts}."


def plain_forecast(found: list[Forecast]) -> Forecast:
    """Return the forecast of plain decoding."""
    return next(forecast for forecast in found if forecast.plan is None)


def check_json(found: PlannerCheck) -> dict[str, object]:
    """Return the findings of a check in the form of JSON."""
    return {
        "choice": _name(found.choice),
        "best": _name(found.best.plan),
        "choice_of_best": round(found.of_best, 4),
        "rows": [
            {
                "plan": _name(row.plan),
                "measured_tokens_per_s": round(row.measured, 3),
                "predicted_tokens_per_s": round(row.predicted, 3),
                "error": round(row.error, 4),
                "tokens_per_step": round(row.yielded, 3),
                "expected_tokens_per_step": round(row.expected, 3),
                "identical": row.identical,
            }
            for row in found.rows
        ],
    }


def show_check(console: Console, found: PlannerCheck) -> None:
    """Print measured and predicted speeds, the fastest first, and how good the choice was."""
    from rich.table import Table

    table = Table(title="Tokens per second")
    for heading in ("plan", "measured", "predicted", "error", "per step", "expected", "same text"):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    for row in sorted(found.rows, key=lambda row: -row.measured):
        table.add_row(
            _name(row.plan),
            f"{row.measured:.2f}",
            f"{row.predicted:.2f}",
            f"{row.error:+.1%}",
            f"{row.yielded:.2f}",
            f"{row.expected:.2f}",
            "yes" if row.identical else "no",
        )
    console.print(table)
    within = sum(abs(row.error) <= 0.1 for row in found.rows)
    name = _name(found.choice)
    console.print(
        f"{within} of {len(found.rows)} predictions within 10 %. The planner takes {name}: "
        f"{found.of_best:.1%} of the fastest that was measured.",
        soft_wrap=True,
        highlight=False,
    )


def _name(plan: StepSetting | None) -> str:
    return "plain" if plan is None else plan.name
