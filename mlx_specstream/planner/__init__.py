"""The planner: what a step costs here, what it will yield, and which tree pays best.

step_costs(model)            what steps cost on this machine, measured once and cached
acceptance(model)       what was recorded with the streams, tree by tree
forecasts(curve, ...)   tokens per second of every plan; `chosen` picks one, or plain decoding
planner_for(model)      the governor of `--tree auto`, which follows the text as it goes
"""

from .acceptance import ACCEPTANCE_FILE, AcceptanceProfile, Rates
from .choose import MARGIN, Forecast, chosen, forecasts
from .costs import acceptance, model_plans, planner_for, step_costs
from .curve import CostCurve, Growth, StepCost
from .measure import measure
from .planner import Planner
from .settings import Plan, candidates, fused_row_limit
from .trace import AnswerTrace, Position

__all__ = [
    "ACCEPTANCE_FILE",
    "MARGIN",
    "AcceptanceProfile",
    "AnswerTrace",
    "CostCurve",
    "Forecast",
    "Growth",
    "Plan",
    "Planner",
    "Position",
    "Rates",
    "StepCost",
    "acceptance",
    "candidates",
    "chosen",
    "forecasts",
    "fused_row_limit",
    "measure",
    "model_plans",
    "planner_for",
    "step_costs",
]
