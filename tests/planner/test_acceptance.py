"""Recorded positions must tell what real steps accept, for every kind of tree."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.config import DecodeConfig
from mlx_specstream.errors import DataError
from mlx_specstream.model.attention import FusedAttention
from mlx_specstream.planner.acceptance import (
    AcceptanceProfile,
    Rates,
    assumed_profile,
    profile_of,
)
from mlx_specstream.planner.record import looked_up, record_answer
from mlx_specstream.planner.settings import StepSetting, candidates
from mlx_specstream.planner.trace import AnswerTrace, Position
from mlx_specstream.speculation.tree import DraftTree
from tests.support.engine import decode, random_streams, small_model, stream_config, stream_decoder

THE_CAT_SAT = Position((1, 5), (1, 2))


def test_a_position_tells_what_each_tree_holds() -> None:
    expected = {"chain": 1, "chain1": 1, "2": 1, "5": 1, "6": 2, "16": 2, "2^2": 2, "1^2": 1}
    for name, accepted in expected.items():
        assert THE_CAT_SAT.accepted(StepSetting.parse(name), 4) == accepted, name
    assert Position().accepted(StepSetting.parse("16"), 4) == 0
    pruned = Position((1, 5), (1, 2), {16: (1, 9)})
    for name, accepted in {"16:8": 1, "16:10": 2, "16:1": 0, "32:8": 0}.items():
        assert pruned.accepted(StepSetting.parse(name), 4) == accepted, name


def test_the_true_path_is_looked_up_in_a_tree() -> None:
    #        0 root
    #   1 'a' -.1   2 'b' -.5   3 'c' -2      4 'a'>'b' -.6    5 'b'>'a' -.9
    tree = DraftTree(
        mx.array([9, 1, 2, 3, 2, 1]),
        mx.array([0, 0, 0, 0, 1, 2]),
        mx.array([0, 1, 1, 1, 2, 2]),
        depth=2,
        scores=mx.array([0.0, -0.1, -0.5, -2.0, -0.6, -0.9]),
    )
    assert looked_up(tree, [2, 1, 7]) == Position((2, 4), (2, 1))
    assert looked_up(tree, [1, 2]) == Position((1, 3), (1, 1))
    assert looked_up(tree, [3]) == Position((5,), (3,))
    assert looked_up(tree, [8, 1]) == Position()


@pytest.mark.parametrize("mode", ["lossless", "shared", "next token known"])
def test_walking_the_records_is_decoding(mode: str) -> None:
    """The heart of every prediction: accepted drafts, step by step, are those of real decoding."""
    model = small_model(layers=3, vocab=12, seed=1)
    known = {"mode": "lossless", "next_token_rank": 3, "conditioner_tokens": 2}
    fields = known if mode == "next token known" else {"mode": mode}
    streams = random_streams(model, stream_config(**fields, num_streams=3), scale=0.1)
    hits = 0
    for prompt in ([1, 2, 3], [5, 6, 7, 8]):
        trace = record_answer(streams, prompt, 40, ())
        assert len(trace.positions) == 40
        names = ["chain", "chain2", "3", "4", "7", "12", "2^2", "3^3", "16:4", "16:6"]
        names += ["32:8"] if mode != "shared" else []
        names += ["8 inline:2", "8 inline:4", "16 inline:4"] if mode == "lossless" else []
        for name in names:
            plan = StepSetting.parse(f"{name} inline" if mode == "shared" else name)
            run = decode(stream_decoder(streams, plan.config(DecodeConfig())), prompt, 40)
            real = [step.accepted for step in run.steps[1:]]
            walked = trace.walk(plan, 3)
            assert walked[:-1] == real[: len(walked) - 1], name
            hits += sum(walked)
    assert hits > 20


def test_rates_count_what_was_reached() -> None:
    rates = Rates.of([0, 1, 2, 2, 0], depth=2)
    np.testing.assert_allclose(rates.chances, [(3 + 0.25) / 5.5, (2 + 0.25) / 3.5])
    first, second = rates.chances
    assert rates.tokens_per_step() == pytest.approx(1 + first + first * second)
    assert Rates.of([], 0).tokens_per_step() == 1


def profile(*tasks: str) -> AcceptanceProfile:
    late = Position((3,), (2,), {16: (2,), 32: (4,)}, {8: (1, 0)})
    positions = (THE_CAT_SAT, Position(), late, Position(ends={8: (0,)}))
    answers = tuple(AnswerTrace(positions, task) for task in tasks)
    return AcceptanceProfile(4, answers, True, "mine", True)


def test_profiles_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    profile("chat", "sql").save(path)
    read = AcceptanceProfile.load(path)
    assert read.to_dict() == profile("chat", "sql").to_dict()
    assert [a.positions for a in read.answers] == [a.positions for a in profile("a", "b").answers]
    assert read.tasks == ["chat", "sql"]
    assert read.only("sql").num_positions == 4
    assert read.has_pruned
    assert read.has_ends
    assert read.only("chat").deferred_only
    with pytest.raises(DataError, match="no answers of the task 'code'"):
        read.only("code")


def test_a_step_that_ends_without_streams_is_followed_by_one_without_drafts() -> None:
    good = Position((1, 2), (1, 1), ends={8: (3, 0, 1)})
    trace = AnswerTrace((good,) * 9)
    assert trace.walk(StepSetting.parse("8 inline"), 4) == [2, 2, 2]
    # Two drafts accepted end at the node that comes second, none at the one that comes fourth.
    assert trace.walk(StepSetting.parse("8 inline:2"), 4) == [2, 2, 2]
    assert trace.walk(StepSetting.parse("8 inline:1"), 4) == [2, 0, 2, 0]
    assert trace.walk(StepSetting.parse("16 inline:4"), 4) == [
        2,
        0,
        2,
        0,
    ]  # nothing known of 16 rows


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"version": 2}', '{"version": 1, "num_streams": 4, "answers": [3]}']
)
def test_damaged_profiles_are_refused_and_not_used(text: str, tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    path.write_text(text)
    with pytest.raises(DataError, match="acceptance records"):
        AcceptanceProfile.load(path)
    assert profile_of(tmp_path) is None
    assert profile_of(tmp_path / "none") is None
    assert profile_of("") is None


def test_shipped_records_are_plausible() -> None:
    from mlx_specstream.weights.shipped import SHIPPED, shipped_names

    for name in shipped_names():
        found = profile_of(SHIPPED / name)
        if found is None:
            assert name != "demo-chat"  # what is assumed of streams without records
            continue
        chain, wide = (found.tokens_per_step(StepSetting.parse(tree)) for tree in ("chain", "16"))
        assert 1.3 < chain < wide < found.num_streams + 1
    assert assumed_profile(2).tokens_per_step(StepSetting.parse("16")) <= 3


def test_candidates_keep_off_the_slow_rows() -> None:
    names = [plan.name for plan in candidates(4, "lossless")]
    assert {"chain1", "chain4", "3", "16", "32", "3 inline"} <= set(names)
    assert len(names) == len(set(names))
    pruned = {plan.name for plan in candidates(4, "lossless", prunable=True)}
    assert {"16:8", "16:6 inline"} <= pruned - set(names)
    some = {plan.name for plan in candidates(4, "lossless", ends_known=True)}
    assert {"8 inline:2", "16 inline:4"} <= some - set(names)
    shared = [*candidates(4, "shared", prunable=True, ends_known=True)]
    assert "16:6 inline" in {plan.name for plan in shared}
    assert not any(plan.stream_nodes for plan in shared)
    every = candidates(4, "lossless", prunable=True, ends_known=True)
    assert [StepSetting.parse(plan.name) for plan in every] == every
    assert {p.schedule for p in candidates(4, "shared")} == {"inline"}
    assert {p.schedule for p in candidates(4, "lossless", "inline")} == {"inline"}


def attended(attention: FusedAttention, **known: bool) -> set[str]:
    found = candidates(4, "lossless", attention=attention, **known)
    return {plan.name for plan in found}


def test_plans_with_a_pass_off_the_fused_attention_are_left_out() -> None:
    # Eight query heads on one key head: four rows are fused, five to eight are not, nine are.
    eight = FusedAttention(32, 4, 128)
    assert [rows for rows in range(1, 13) if eight.loses(rows)] == [5, 6, 7, 8]
    names = attended(eight, prunable=True, ends_known=True)
    assert {"chain1", "chain3", "4", "10", "16", "16:4", "3 inline"} <= names
    # Of lower layers, of what pruning leaves for the upper ones, of nodes with their streams beside.
    assert not names & {"chain4", "5", "8", "16:8", "32:8", "8 inline:2"}
    for group in (7, 8):
        at = FusedAttention(4 * group, 4, 128)
        for plan in candidates(6, "lossless", prunable=True, ends_known=True, attention=at):
            assert not any(4 < rows <= 8 for rows in plan.passes(6)), plan.name
    # Three heads on one: eight rows are fused, and nothing is left out.
    assert attended(FusedAttention(9, 3, 64)) == {p.name for p in candidates(4, "lossless")}
    # Groups of five: six rows are, and two nodes with four streams each are ten.
    assert "6" in attended(FusedAttention(40, 8, 128))
    assert "8" not in attended(FusedAttention(40, 8, 128))


def test_the_size_of_heads_decides_too() -> None:
    # Of 256, no kernel takes more than eight rows: wide trees, and inline steps with many streams.
    wide = attended(FusedAttention(8, 4, 256), prunable=True)
    assert {"8", "chain4"} <= wide
    assert not wide & {"10", "16", "16:8", "3 inline", "chain1 inline"}
    # Where plain decoding is not fused either, no plan loses anything.
    for size in (72, 80, 112, 192):
        assert attended(FusedAttention(8, 8, size)) == {p.name for p in candidates(4, "lossless")}
