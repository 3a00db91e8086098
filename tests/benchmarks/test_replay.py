"""The planner on paper: costs add up, good text is sped up, poor text costs little."""

from __future__ import annotations

import pytest

from benchmarks.replay import Replayed, add, as_markdown, replay
from mlx_specstream.planner import (
    AcceptanceProfile,
    AnswerTrace,
    CostCurve,
    Position,
    StepCost,
    StepSetting,
)
from mlx_specstream.planner.planner import Planner

EIGHT = StepSetting.parse("8")
CURVE = CostCurve(4, 256, StepCost(0.01), {EIGHT: StepCost(0.02)})


def answer(accepted: int, length: int, word: float, task: str = "chat") -> AnswerTrace:
    """Return an answer of whose trees `accepted` drafts are right, and that expect `word` of them."""
    chances = (1.0, *[word / 7] * 7)
    position = Position(tuple(range(1, accepted + 1)), (1,) * accepted, chances=chances)
    return AnswerTrace((position,) * length, task)


def planner(*answers: AnswerTrace) -> Planner:
    return Planner(CURVE, AcceptanceProfile(4, answers))


def test_good_text_costs_a_look_and_its_steps() -> None:
    good = answer(3, 41, 3.0)
    # The first token comes from the look; ten steps of four tokens follow.
    assert replay(planner(good), good, 100) == pytest.approx(2.0 + 10 * 2.0)


def test_poor_text_costs_little_more_than_plain_decoding() -> None:
    poor = answer(0, 400, 0.2)
    cost = replay(planner(answer(3, 40, 3.0)), poor, 100)
    assert 400 < cost < 408


def test_tables_tell_what_came_of_expectations() -> None:
    found, governor = Replayed(), planner(answer(2, 40, 2.2))
    add(found, governor, answer(2, 44, 2.2), 50)
    add(found, governor, answer(0, 44, 0.3, "poems"), 50)
    text = as_markdown(found)
    assert "| 2 to 2.5 | 40 | 2.00 |" in text
    assert "| 0 to 0.5 | 40 | 0.00 |" in text
    assert found.by_category["chat"].speedup > 1.2
    assert 0.9 < found.by_category["poems"].speedup < 1
    assert found.by_category["poems"].tokens / found.by_category["poems"].always < 0.6
