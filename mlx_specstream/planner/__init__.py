"""The planner: which tree pays here, and whether any does.

| file | the idea it holds |
|---|---|
| `planner.py` | keeps the tree that pays, decodes plainly where none does, and probes again |
| `adaptive.py` | the decoding loop that follows it: speculative while that pays, plain while it does not |
| `settings.py` | a setting of a step: tree, schedule, pruning |
| `choose.py` | which setting pays best: expected tokens over seconds, plain decoding included |
| `costs.py` | `step_costs`: what steps cost here, measured once and kept; `planner_for` a model |
| `measure.py` | measuring them: real steps, in turn with plain decoding |
| `messages.py` | what a message between processes costs, and whether costs still hold |
| `timing.py` | the samples measuring takes |
| `curve.py` | seconds per step for each setting |
| `identity.py` | what costs hold for: machine, software, model, streams |
| `prior.py` | costs on Apple's chips from published figures: predictions |
| `acceptance.py` | `acceptance`: what was recorded with the streams, tree by tree |
| `trace.py` | one recorded answer |
| `record.py` | recording it |
| `correction.py` | what steps really cost, by the clock while decoding |
| `lookup.py` | whether steps of look-up alone pay, and how many rows of it |
| `trial.py` | whether a drafter other than streams pays, found out by the clock |
"""

from .acceptance import ACCEPTANCE_FILE, AcceptanceProfile, Rates
from .choose import MARGIN, Forecast, chosen, forecasts
from .costs import acceptance, model_plans, planner_for, step_costs
from .curve import CostCurve, Growth, StepCost
from .measure import measure
from .planner import Planner
from .settings import StepSetting, candidates
from .trace import AnswerTrace, Position

__all__ = [
    "ACCEPTANCE_FILE",
    "MARGIN",
    "AcceptanceProfile",
    "AnswerTrace",
    "CostCurve",
    "Forecast",
    "Growth",
    "Planner",
    "Position",
    "Rates",
    "StepCost",
    "StepSetting",
    "acceptance",
    "candidates",
    "chosen",
    "forecasts",
    "measure",
    "model_plans",
    "planner_for",
    "step_costs",
]
