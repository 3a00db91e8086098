"""The planner replayed: what drafted trees expect of themselves, and what decisions by it come to.

Answers are recorded once, with the streams' trees at every token. The planner then decodes them
again on paper: its decisions are the real ones, acceptance is the recorded one, and a step costs
what was measured on this machine. That shows in seconds, and free of a machine's moods, what a
policy gives by category.

    python -m benchmarks.replay --model demo -m 96
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_specstream.bench.cases import BUILT_IN, Case, chosen_cases
from mlx_specstream.bench.methods import Method
from mlx_specstream.errors import StreamsError
from mlx_specstream.exit_status import exit_status
from mlx_specstream.planner.curve import CostCurve
from mlx_specstream.planner.planner import Planner
from mlx_specstream.planner.settings import StepSetting
from mlx_specstream.planner.trace import AnswerTrace
from mlx_specstream.speculation.result import StepResult

if TYPE_CHECKING:
    from mlx_specstream.loading.load import StreamModel

BINS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, float("inf"))
ROWS = 8  # of the trees whose expectations are tabled


@dataclass
class Replay:
    """One kind of text, decoded on paper. cost, always: plain tokens' worth of time that the
    planner took, and that verifying a tree of `ROWS` rows in every step would have.
    """

    tokens: int = 0
    cost: float = 0.0
    always: float = 0.0

    @property
    def speedup(self) -> float:
        return self.tokens / self.cost


@dataclass
class Replayed:
    """Answers by category, and (expected, accepted) of every tree of `ROWS` rows."""

    by_category: dict[str, Replay] = field(default_factory=dict)
    trees: list[tuple[float, int]] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Return the mean speed-up of categories."""
        return sum(r.speedup for r in self.by_category.values()) / len(self.by_category)


def replay(planner: Planner, answer: AnswerTrace, length: int) -> float:
    """Return what decoding an answer costs under a planner's decisions, in plain tokens.

    Args:
        planner: with best-first plans only, and no clock.
        length: committed tokens before the answer.
    """
    curve, positions = planner.curve, answer.positions
    cost, at = 0.0, -1
    plan, drafted = planner.begin(length), None
    while at < len(positions) - 1:
        accepted = 0
        if drafted is not None:
            accepted = positions[at].accepted(drafted, curve.num_streams)
            cost += curve.relative(drafted, length)
        else:
            cost += 1.0 if plan is None else curve.restart(length)
        at += 1 + accepted
        over = at >= len(positions) - 1
        expected = None
        if plan is not None and not over:
            expected = mx.array(positions[at].expected(plan.rows(curve.num_streams)))
        result = StepResult([0] * (1 + accepted), 0, _NOTHING, expected=expected)
        following = planner.after(result, drafted, length + at + 1)
        drafted = plan if following is not None else None
        plan = following
    return cost


_NOTHING = mx.zeros((0, 1))


def best_first(curve: CostCurve) -> list[StepSetting]:
    """Return the curve's plans that can be replayed: best-first trees, unpruned, streams everywhere.

    Raises:
        StreamsError: none was measured.
    """
    plans = [
        plan
        for plan in curve.steps
        if plan.tree.kind == "best" and plan.prune is None and not plan.stream_nodes
    ]
    if not plans:
        raise StreamsError(
            "no best-first tree was measured on this machine; raise SPECSTREAM_PLAN_SECONDS and "
            "delete the costs in the cache folder."
        )
    return plans


def add(found: Replayed, planner: Planner, answer: AnswerTrace, length: int) -> None:
    """Replay an answer and take it into the tables."""
    curve, always = planner.curve, StepSetting.parse(str(ROWS))
    entry = found.by_category.setdefault(answer.task, Replay())
    entry.tokens += len(answer.positions)
    entry.cost += replay(planner, answer, length)
    steps = len(answer.walk(always, curve.num_streams))
    entry.always += curve.restart(length) + steps * curve.relative(always, length)
    # The last positions' followers are cut off with the answer.
    for position in answer.positions[: -curve.num_streams]:
        accepted = position.accepted(always, curve.num_streams)
        found.trees.append((position.expected(ROWS), accepted))


def as_markdown(found: Replayed) -> str:
    """Return both tables."""
    lines = ["| category | tokens | planner | always 8 rows |", "|---|---|---|---|"]
    for category, one in found.by_category.items():
        lines.append(
            f"| {category} | {one.tokens} | {one.speedup:.2f} | {one.tokens / one.always:.2f} |"
        )
    lines += ["", f"mean of categories: {found.mean:.2f}", ""]
    lines += [f"| expected ({ROWS} rows) | positions | accepted, mean |", "|---|---|---|"]
    for low, high in itertools.pairwise(BINS):
        inside = [accepted for expected, accepted in found.trees if low <= expected < high]
        if inside:
            name = f"{low:g} to {high:g}" if high < BINS[-1] else f"{low:g} and more"
            lines.append(f"| {name} | {len(inside)} | {sum(inside) / len(inside):.2f} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Return the options of `python -m benchmarks.replay`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay")
    parser.add_argument("--model", default="demo", help="model folder, hub id, or 'demo'")
    parser.add_argument(
        "--streams",
        default="auto",
        help="streams, with others for categories after commas (see specstream bench)",
    )
    parser.add_argument("--prompts", default=BUILT_IN, help="prompt file (default: built in)")
    parser.add_argument("--num-prompts", type=int, help="prompts per category (default: all)")
    parser.add_argument("--max-tokens", "-m", type=int, default=96, help="most tokens per answer")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Record, replay and print."""
    from tqdm import tqdm

    from mlx_specstream.bench.competitors import open_competitors
    from mlx_specstream.planner.costs import acceptance, step_costs
    from mlx_specstream.planner.record import record_answer
    from mlx_specstream.prompts import encode_prompt

    args = build_parser().parse_args(argv)
    cases: list[Case] = chosen_cases([args.prompts], (), args.num_prompts, in_turns=True)
    categories = list(dict.fromkeys(case.category for case in cases))
    method = Method("streams", tree="auto", streams=args.streams)
    competitors = open_competitors(args.model, None, {"auto": method}, categories, None)
    planners: dict[str, Planner] = {}
    found = Replayed()
    for case in tqdm(cases, desc="recording", unit="answer"):
        name = competitors.methods["auto"].streams_for(case.category)
        model: StreamModel = competitors.by_streams[name]
        assert model.streams is not None
        if name not in planners:
            curve = step_costs(model)
            if curve is None:
                raise StreamsError("costs were not measured; set SPECSTREAM_PLAN_SECONDS above 0.")
            planners[name] = Planner(curve, acceptance(model), best_first(curve))
        ids = encode_prompt(competitors.tokenizer, case.prompt)
        stop = set(competitors.tokenizer.eos_token_ids)
        answer = record_answer(model.streams, ids, args.max_tokens, stop, case.category)
        add(found, planners[name], answer, len(ids))
    print(as_markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, "replay"))
