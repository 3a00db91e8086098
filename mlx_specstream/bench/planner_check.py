"""Holding the planner to account: predicted against measured tokens per second, tree by tree.

Every prompt is answered plainly and with every tree, a few tokens of each in turns, so that a
slow moment favours none. Predictions take costs from the curve and acceptance from records of the
same prompts, so that what is judged is the arithmetic between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..config import DecodeConfig, TreeSpec
from ..planner.acceptance import AcceptanceProfile
from ..planner.choose import chosen, forecasts
from ..planner.curve import CostCurve
from ..planner.record import positions_of
from ..planner.settings import StepSetting
from ..planner.trace import AnswerTrace
from .measure import Answered, in_turns, ours

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..loading.load import StreamModel

TURN_TOKENS = 16


@dataclass(frozen=True)
class Checked:
    """One plan on all prompts. plan: None is plain decoding.

    measured, predicted: tokens per second. yielded, expected: tokens per step.
    """

    plan: StepSetting | None
    measured: float
    predicted: float
    yielded: float
    expected: float
    identical: bool

    @property
    def error(self) -> float:
        """Return how far the prediction is off, as a share of what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class PlannerCheck:
    """What was found. choice: the plan the planner takes for these prompts."""

    rows: list[Checked]
    choice: StepSetting | None

    @property
    def best(self) -> Checked:
        """Return the row that was measured to be the fastest."""
        return max(self.rows, key=lambda row: row.measured)

    @property
    def of_best(self) -> float:
        """Return the choice's measured speed as a share of the best's."""
        taken = next(row for row in self.rows if row.plan == self.choice)
        return taken.measured / self.best.measured


def small_trees(num_streams: int, most_rows: int, *, shared: bool) -> list[StepSetting]:
    """Return every tree of up to `most_rows` rows that `TreeSpec` can describe.

    Chains, best-first trees of every size, and full products of two levels and more.
    """
    trees = [TreeSpec("chain", branching=1, depth=d) for d in range(1, num_streams + 1)]
    trees += [TreeSpec("best", rows=rows) for rows in range(3, most_rows + 1)]
    for depth in range(2, num_streams + 1):
        for branching in range(2, most_rows):
            tree = TreeSpec("product", branching=branching, depth=depth)
            if sum(branching**level for level in range(depth + 1)) <= most_rows:
                trees.append(tree)
    kept = [tree for tree in trees if tree.num_nodes(num_streams) <= most_rows]
    return [StepSetting(tree, "inline" if shared else "deferred") for tree in kept]


def check(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    curve: CostCurve,
    plans: Sequence[StepSetting],
    on_answer: Callable[[], None] = lambda: None,
) -> PlannerCheck:
    """Answer all prompts with all plans and compare with what the curve predicts.

    The planner's choice among `plans` is for these prompts' acceptance.
    """
    assert model.streams is not None
    runs: dict[StepSetting | None, list[Answered]] = {plan: [] for plan in (None, *plans)}
    same: dict[StepSetting | None, bool] = dict.fromkeys(runs, True)
    traces = []
    for prompt in prompts:
        answers = {
            plan: ours(
                model, tokenizer, prompt, max_tokens, plan.config(DecodeConfig()) if plan else None
            )
            for plan in runs
        }
        in_turns(list(answers.values()), TURN_TOKENS, on_answer)
        text = answers[None].answered.tokens
        for plan, answer in answers.items():
            runs[plan].append(answer.answered)
            same[plan] = same[plan] and answer.answered.tokens == text
        traces.append(AnswerTrace(tuple(positions_of(model.streams, prompt, text))))
    profile = AcceptanceProfile(model.streams.num_streams, tuple(traces))
    lengths = [len(p) + len(r.tokens) / 2 for p, r in zip(prompts, runs[None], strict=True)]
    context = int(sum(lengths) / len(lengths))
    found = forecasts(curve, profile, plans=plans, context=context)
    rows = []
    for forecast in found:
        found_of = runs[forecast.plan]
        tokens = sum(len(answered.tokens) - 1 for answered in found_of)
        steps = sum(answered.passes - 1 for answered in found_of)
        rows.append(
            Checked(
                forecast.plan,
                measured=tokens / max(sum(answered.decode_s for answered in found_of), 1e-9),
                predicted=forecast.tokens_per_s,
                yielded=tokens / max(steps, 1),
                expected=forecast.tokens_per_step,
                identical=same[forecast.plan],
            )
        )
    return PlannerCheck(rows, chosen(found).plan)


def scaled(verdict: PlannerCheck) -> PlannerCheck:
    """Return the verdict with predictions in units of measured plain decoding.

    The curve's clock and the check's may differ when a machine is warm; what the planner
    decides by is the ratio.
    """
    plain = next(row for row in verdict.rows if row.plan is None)
    factor = plain.measured / plain.predicted
    rows = [replace(row, predicted=row.predicted * factor) for row in verdict.rows]
    return PlannerCheck(rows, verdict.choice)
