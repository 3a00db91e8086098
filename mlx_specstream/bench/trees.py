"""The planner in a benchmark: its costs and choice, and how both compare with every small tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import DecodeConfig
from ..loading.load import StreamModel
from ..planner.choose import chosen, forecasts
from ..planner.costs import planner_for, step_costs
from ..planner.measure import measure
from ..prompts import encode_prompt
from .cases import Case
from .competitors import Competitors
from .planner_check import check, scaled, small_trees
from .planner_report import check_json

CHECKED_PROMPTS = 4  # per category, if the settings do not say
MEASURE_S = 60.0


def plan_costs(competitors: Competitors) -> dict[str, Any]:
    """Return the cost curve, forecasts and choice for each set of streams that is planned with.

    Measures what is not in the cache, so that no answer's time holds it.
    """
    found = {}
    for name, config in competitors.configs.items():
        if config.tree.kind != "auto":
            continue
        for streams, joined in competitors.streams_of(name).items():
            planner = planner_for(joined, config)
            if planner is not None and streams not in found:
                found[streams] = described(joined, config)
    return found


def described(model: StreamModel, config: DecodeConfig) -> dict[str, Any]:
    """Return what the planner knows of a model with streams before the first token."""
    planner = planner_for(model, config)
    curve = step_costs(model)
    assert planner is not None
    assert curve is not None
    found = forecasts(planner.curve, planner.profile, plans=planner.plans)
    choice = chosen(found)
    return {
        "curve": curve.to_dict(),
        "acceptance": planner.profile.source,
        "chosen": choice.name,
        "forecasts": [
            {
                "plan": forecast.name,
                "kind": "plain" if forecast.plan is None else _kind(forecast.plan),
                "rows": 1 if forecast.plan is None else forecast.plan.rows(curve.num_streams),
                "tokens_per_step": forecast.tokens_per_step,
                "step_s": forecast.seconds_per_step,
                "speedup": forecast.speedup,
            }
            for forecast in found
        ],
    }


def _kind(plan: Any) -> str:
    """Return the series of a plan: chains, best-first trees, pruned ones, by schedule."""
    tree = "pruned" if plan.prune is not None else plan.tree.kind
    return f"{tree}, {plan.schedule}"


def exhaustive(
    competitors: Competitors,
    cases: list[Case],
    category: str,
    max_tokens: int,
    most_rows: int,
    on_answer: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Answer a category's prompts with every tree of up to `most_rows` rows.

    Returns, in JSON's terms, measured and predicted tokens per second of each tree and of plain
    decoding, the planner's choice among them for these prompts, and its share of the best.
    """
    model = competitors.by_streams[competitors.first_streams(category)]
    assert model.streams is not None
    plans = small_trees(model.streams.num_streams, most_rows, shared=model.streams.shared)
    curve = measure(model.streams, plans, budget_s=MEASURE_S)
    assert curve is not None, "the model computes NaN"
    ids = [encode_prompt(competitors.tokenizer, case.prompt) for case in cases]
    found = scaled(check(model, competitors.tokenizer, ids, max_tokens, curve, plans, on_answer))
    return {"prompts": len(ids), "streams": model.streams_name, **check_json(found)}


def num_answers(competitors: Competitors, cases: list[Case], category: str, most_rows: int) -> int:
    """Return how many answers `exhaustive` will take."""
    model = competitors.by_streams[competitors.first_streams(category)]
    assert model.streams is not None
    plans = small_trees(model.streams.num_streams, most_rows, shared=model.streams.shared)
    return len(cases) * (1 + len(plans))
