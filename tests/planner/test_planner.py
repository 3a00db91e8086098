"""Costs, forecasts and the planner's decisions, without a model."""

from __future__ import annotations

import random
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_specstream.planner import (
    AcceptanceProfile,
    AnswerTrace,
    CostCurve,
    Growth,
    Planner,
    Position,
    StepCost,
    StepSetting,
    chosen,
    forecasts,
)
from mlx_specstream.planner.correction import TimingCorrection
from mlx_specstream.planner.planner import FIRST, FIRST_PROBE, PROBE_SHARE
from mlx_specstream.speculation.result import StepResult

P = StepSetting.parse
NOTHING = mx.zeros((1, 1))


def curve(**relative: float) -> CostCurve:
    """Return a curve on which a plain token takes a second; `c2` is chain2, `r8` eight rows."""
    names = {"c": "chain", "r": ""}
    steps = {P(names[k[0]] + k[1:]): StepCost(v) for k, v in relative.items()}
    return CostCurve(4, 256, StepCost(1.0), steps)


def profile(chance: float, seed: int = 0, length: int = 4000) -> AcceptanceProfile:
    """Return records in which every first choice is right with `chance`, the second with half of it."""
    luck = random.Random(seed)

    def position() -> Position:
        orders, ranks, order = [], [], 0
        for _ in range(4):
            draw = luck.random()
            rank = 1 if draw < chance else 2 if draw < chance + (1 - chance) / 2 else 0
            if not rank:
                break
            order += 1 if rank == 1 else 3
            orders.append(order)
            ranks.append(rank)
        return Position(tuple(orders), tuple(ranks))

    return AcceptanceProfile(4, (AnswerTrace(tuple(position() for _ in range(length))),))


def test_unmeasured_plans_lie_between_their_neighbours() -> None:
    costs = curve(c1=1.2, c4=1.6, r4=1.5, r8=2.5)
    assert costs.relative(P("6")) == pytest.approx(2.0)
    assert costs.relative(P("chain2")) == pytest.approx(1.2 + 0.4 / 3)
    assert costs.relative(P("3")) == pytest.approx(1.5)  # no cheaper than the smallest known
    assert costs.relative(P("16")) == pytest.approx(5.0)  # in proportion to the widest known
    assert costs.relative(P("2^2")) == pytest.approx(2.25)
    assert costs.relative(P("8 inline")) > 2


def test_costs_grow_with_the_context() -> None:
    costs = CostCurve(
        4, 256, StepCost(1.0), {P("8"): StepCost(2.0)}, Growth(0.001, 0.0001, 0.00005)
    )
    assert costs.seconds(None, 1256) == pytest.approx(2.0)
    assert costs.relative(P("8"), 1256) == pytest.approx(2.5 / 2)
    probe = replace(costs, restart_s=3.0)
    assert probe.restart() == probe.restart(256) == pytest.approx(3.0)
    assert probe.restart(1256) == pytest.approx(3.15 / 2)
    assert replace(costs, restart_s=1.4).restart(1256) == 1.0, "never less than a plain token"


def test_curves_survive_json() -> None:
    costs = CostCurve(
        4, 256, StepCost(0.01, 0.1, 5), {P("16:8"): StepCost(0.02, 0.2, 3)}, key={"a": 1}
    )
    assert CostCurve.from_dict(costs.to_dict()) == costs
    for damage in (
        {"plain": None},
        {"steps": {"x": {}}},
        {"context": "far"},
        {"num_streams": True},
    ):
        with pytest.raises((ValueError, KeyError, TypeError)):
            CostCurve.from_dict({**costs.to_dict(), **damage})


def test_the_choice_is_the_fastest_that_beats_plain_by_the_margin() -> None:
    records = profile(0.6)
    found = forecasts(curve(c4=1.8, r8=2.0, r16=3.5), records)
    expected = {None: 1.0, P("chain4"): 0.0, P("8"): 0.0, P("16"): 0.0}
    assert {f.plan for f in found} == set(expected)
    assert [f.speedup for f in found] == sorted((f.speedup for f in found), reverse=True)
    for forecast in found:
        if forecast.plan is not None:
            steps = records.walk(forecast.plan)
            assert forecast.tokens_per_step == pytest.approx(1 + sum(steps) / len(steps), rel=0.02)
    assert chosen(found).plan == P("8")
    assert chosen(forecasts(curve(r8=3.4), records)).plan is None
    barely = forecasts(curve(r8=records.tokens_per_step(P("8")) / 1.02), records)
    assert barely[0].plan == P("8")
    assert chosen(barely).plan is None


class Text:
    """Drives a planner as `AutoDecoder` does, over text accepted as given records say.

    What a tree expects lies halfway between what is accepted of it and what is on average.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.seconds = 0.0
        self.tokens = 0
        self.steps: list[StepSetting | None] = []

    def answer(self, records: AcceptanceProfile, tokens: int) -> None:
        planner, done, at = self.planner, 0, 0
        positions = records.answers[0].positions
        average = {p: records.tokens_per_step(p) - 1 for p in planner.curve.steps}
        plan, drafted = planner.begin(100), None
        while done < tokens:
            accepted = 0
            if drafted is not None:
                accepted = positions[at % len(positions)].accepted(drafted, 4)
            restarting = plan is not None and drafted is None
            cost = planner.curve.restart() if restarting else planner.curve.seconds(plan)
            self.seconds += cost
            self.steps.append(plan)
            done += accepted + 1
            at += accepted + 1
            expected = None
            if plan is not None:
                coming = positions[at % len(positions)].accepted(plan, 4)
                expected = mx.array(0.5 * (coming + average[plan]))
            result = StepResult([1] * (accepted + 1), 0, NOTHING, expected=expected)
            following = planner.after(result, drafted if plan is not None else None, 100 + done)
            # A restart, and a change from plain decoding, drafts first.
            drafted = plan if plan is not None and following is not None else None
            plan = following
        self.tokens += done

    @property
    def speedup(self) -> float:
        return self.tokens / self.seconds


def test_easy_text_is_decoded_speculatively() -> None:
    text = Text(Planner(curve(c4=1.6, r8=2.0, r16=3.0), profile(0.6)))
    text.answer(profile(0.6, seed=2), 400)
    assert text.speedup > 1.25
    assert text.steps.count(None) < 6  # a poor tree at first


def test_hard_text_is_soon_decoded_plainly_and_costs_little() -> None:
    text = Text(Planner(curve(c4=1.8, r8=2.3), profile(0.6)))
    for seed in range(8):
        text.answer(profile(0.1, seed=seed), 250)
    assert text.steps.index(None) < 30
    assert text.speedup > 0.98


def test_easy_text_is_found_again() -> None:
    planner = Planner(curve(c4=1.8, r8=2.3), profile(0.4))
    text = Text(planner)
    text.answer(profile(0.05), 200)
    assert planner.plan is None
    easy = Text(planner)
    easy.answer(profile(0.85, seed=3), 3000)
    assert easy.steps[-1] is not None
    assert easy.speedup > 1.2


def test_probing_costs_a_hundredth_in_the_long_run() -> None:
    text = Text(Planner(curve(c4=2.2, r8=2.6), profile(0.2)))
    text.answer(profile(0.1), 20000)
    assert text.steps[0] is not None
    assert text.steps[1000:].count(None) < len(text.steps[1000:])
    assert text.speedup > 0.985


def test_one_good_tree_in_poor_text_is_verified() -> None:
    """Before it is verified a tree's own probabilities tell that it is worth it."""
    planner = Planner(curve(c4=2.2, r8=2.5), profile(0.3))
    poor = StepResult([1], 0, NOTHING, expected=mx.array(0.3))
    for _ in range(3):
        plan = planner.begin(10)
        while plan is None:
            plan = planner.after(StepResult([1], 0, NOTHING), None, 11)
        assert planner.after(poor, None, 11) is None
    while planner.after(StepResult([1], 0, NOTHING), None, 12) is None:
        pass
    good = StepResult([1], 0, NOTHING, expected=mx.array(3.5))
    assert planner.after(good, None, 13) is not None
    assert planner.after(poor, planner.plan, 14) is None


def test_after_probes_in_vain_an_answer_begins_plainly() -> None:
    """A first token costs what it costs plainly until a look has been worth it again."""
    planner = Planner(curve(c4=2.2, r8=2.5), profile(0.3))
    token, good = StepResult([1], 0, NOTHING), StepResult([1], 0, NOTHING, expected=mx.array(3.5))
    poor = StepResult([1], 0, NOTHING, expected=mx.array(0.3))
    assert planner.begin(10) is not None
    assert planner.after(poor, None, 11) is None
    for look, later in ((poor, False), (good, True)):
        assert planner.begin(10) is None
        plans = [planner.after(token, None, 11 + n) for n in range(FIRST_PROBE)]
        assert [plan is not None for plan in plans] == [False] * (FIRST_PROBE - 1) + [True]
        assert (planner.after(look, None, 20) is not None) == later
    assert planner.begin(10) is not None


@pytest.mark.parametrize(("context", "look"), [(256, 1.4), (1256, 2.4)])
def test_probes_that_grow_dear_with_the_context_are_rarer(context: int, look: float) -> None:
    """The wait grows with what a look costs beyond a plain token: its share of the time stays."""
    growing = replace(curve(r8=2.5), restart_s=1.4, growth=Growth(0.0, 0.001, 0.0))
    planner = Planner(growing, profile(0.6))
    planner.begin(context)
    poor = StepResult([1], 0, NOTHING, expected=mx.array(0.1))
    assert planner.after(poor, None, context) is None
    wait = planner.plain_tokens_ahead()
    assert wait is not None
    assert wait == pytest.approx(FIRST * (look - 1) / PROBE_SHARE, abs=1)


def test_in_good_text_nobody_waits_for_the_next_tree() -> None:
    class Unread:
        def item(self) -> float:
            raise AssertionError("waited")

    planner = Planner(curve(c4=1.2, r8=1.3), profile(0.6))
    planner.begin(10)
    rich = mx.array(2.5)
    plan = planner.after(StepResult([1], 0, NOTHING, expected=rich), None, 11)
    unread = StepResult([1, 2, 3], 7, NOTHING, expected=Unread())  # type: ignore[arg-type]
    assert planner.after(unread, plan, 14) == plan


def test_expectations_are_corrected_by_what_comes_of_them() -> None:
    """Streams that promise twice what they keep are soon taken at half their word."""
    planner = Planner(curve(c4=1.1, r8=1.2), profile(0.6))
    plan = planner.begin(10)
    assert plan is not None
    promised = StepResult([1, 2], 1, NOTHING, expected=mx.array(2.0))
    plan = planner.after(StepResult([1], 0, NOTHING, expected=mx.array(2.0)), None, 11)
    for _ in range(300):
        plan = planner.after(promised, plan, 12)
    assert planner.trust == pytest.approx(0.5, rel=0.1)
    assert planner.ease is not None
    assert planner.ease * (planner.profile.tokens_per_step(plan) - 1) == pytest.approx(1.0, rel=0.1)


def test_the_clock_corrects_a_curve_that_was_measured_wrongly() -> None:
    """Steps that cost half as much again as measured are not taken any more where that does not pay."""
    now = 0.0
    planner = Planner(curve(r8=2.0), profile(0.3), clock=lambda: now)
    fair = mx.array(1.3)  # corrected 1.17: worth a price of 2.0, not of 3.0
    plan, drafted, steps = planner.begin(10), None, []
    for _ in range(400):
        now += 1.0 if plan is None else 1.7 if drafted is None else 3.0
        accepted = 1 if drafted is not None else 0
        result = StepResult([1] * (1 + accepted), 0, NOTHING, expected=fair if plan else None)
        following = planner.after(result, drafted if plan is not None else None, 10)
        drafted = plan if plan is not None and following is not None else None
        steps.append(plan)
        plan = following
    assert planner.correction.factor > 1.08
    assert steps[-150:].count(None) > 140
    trusting = Planner(curve(r8=2.0), profile(0.3))
    trusting.begin(10)
    assert trusting.after(StepResult([1], 0, NOTHING, expected=fair), None, 11) is not None


def test_a_bad_moment_is_forgotten() -> None:
    """Steps that once looked half as dear again are looked at in every answer, and tried again."""
    planner = Planner(curve(r8=3.5), profile(0.6))
    planner.correction.of_steps = 1.5
    assert not planner.is_never_profitable
    for _ in range(20):
        assert planner.begin(10) is not None or planner.plain_tokens_ahead() == FIRST_PROBE
    assert planner.correction.factor == pytest.approx(1.06, abs=0.02)


def test_a_pause_is_no_price() -> None:
    correction = TimingCorrection()
    for _ in range(50):
        correction.plain(0.01, 0.01)
        correction.step(0.02, 0.02)
    correction.step(60.0, 0.02)
    assert correction.factor == pytest.approx(1.0, abs=0.11)
    for _ in range(500):
        correction.step(0.5, 0.02)
    assert correction.factor <= 1.5


@pytest.mark.parametrize("reading", [0.0, 30.0])
def test_a_slow_reader_is_no_slow_step(reading: float) -> None:
    """What passes while the caller has the word is not the machine's time."""
    now, drafted = 0.0, None
    planner = Planner(curve(r8=2.0), profile(0.6), clock=lambda: now)
    planner.begin(10)
    for _ in range(60):
        now += 2.0
        planner.after(StepResult([1, 1], 7, NOTHING, expected=mx.array(3.0)), drafted, 10)
        drafted = planner.plan
        planner.pause()
        now += reading
        planner.resume()
    assert planner.correction.factor == pytest.approx(1.0, abs=0.01)


def test_a_step_of_look_up_is_not_taken_for_a_slow_plain_token() -> None:
    now = 0.0
    planner = Planner(curve(r8=2.0), profile(0.6), clock=lambda: now)
    planner.begin(10)
    planner.plan = None
    planner._until_probe = None
    for step in range(60):
        if step % 3 == 2:
            now += 1.9
            planner.looked_up(10)
        else:
            now += 1.0
            planner.after(StepResult([1], 0, NOTHING), None, 10)
    assert planner.correction.factor == pytest.approx(1.0, abs=0.01)


def test_a_machine_that_slows_down_is_no_reason_to_stay_plain() -> None:
    """Steps look dear until plain tokens are timed again; later drift moves both."""
    correction = TimingCorrection()
    for _ in range(50):
        correction.step(0.026, 0.02)
    assert correction.factor == pytest.approx(1.3, rel=0.02)
    for _ in range(20):
        correction.plain(0.013, 0.01)
    assert correction.factor == pytest.approx(1.0, rel=0.05)
    for _ in range(200):
        correction.plain(0.009, 0.01)
    assert correction.factor == pytest.approx(1.0, rel=0.1)


def test_nothing_is_probed_where_nothing_can_pay() -> None:
    planner = Planner(curve(c1=3.0, c4=6.0, r8=9.0), profile(0.9))
    assert planner.is_never_profitable
    text = Text(planner)
    text.answer(profile(0.99), 5000)
    assert set(text.steps) == {None}
    assert planner.plain_tokens_ahead() is None


def test_plain_tokens_are_announced() -> None:
    planner = Planner(curve(c4=2.2, r8=2.6), profile(0.2))
    plan = planner.begin(10)
    poor = StepResult([1], 0, NOTHING, expected=mx.array(0.1))
    assert planner.after(poor, None, 11) is None
    left = planner.plain_tokens_ahead()
    assert left is not None
    for expected in range(left, 0, -1):
        assert planner.plain_tokens_ahead() == expected
        plan = planner.after(StepResult([1], 0, NOTHING), None, 11)
    assert plan is not None


def test_a_little_better_is_no_reason_to_change_trees() -> None:
    """Compiled shapes are not given up for a hundredth."""
    records = profile(0.6)
    text = Text(Planner(curve(c4=1.60, r8=2.0, c3=1.40), records))
    text.answer(profile(0.6, seed=4), 4000)
    changes = sum(a != b for a, b in zip(text.steps, text.steps[1:], strict=False))
    assert changes < len(text.steps) / 12


@pytest.mark.parametrize(("gain", "verified"), [(0.20, False), (0.40, True)])
def test_a_tree_must_win_a_share_of_its_extra_cost(gain: float, verified: bool) -> None:
    """In text that does not pay as a whole, a tree is verified for its own sake or not at all."""
    planner = Planner(curve(r8=3.0), profile(0.3))
    planner.begin(10)
    planner.ease, planner.trust = 0.0, 1.0
    own = mx.array(2.0 + gain * 2.0)  # a step costs two tokens more than a plain one
    planner.plan = P("8")
    assert (planner.after(StepResult([1], 0, NOTHING, expected=own), None, 11) is not None) == (
        verified
    )


def test_the_ease_of_the_text_follows_a_few_trees() -> None:
    """One tree moves it by less than half, five by more: neither a whim nor a memory."""
    planner = Planner(curve(r8=1.1), profile(0.6))
    plan = planner.begin(10)
    assert plan is not None
    planner.ease, planner.trust = 1.0, 1.0
    nothing = StepResult([1], 0, NOTHING, expected=mx.array(0.0))
    eases = []
    for _ in range(5):
        planner.plan = plan
        planner.after(nothing, None, 11)
        eases.append(planner.ease)
    assert 0.6 < eases[0] < 0.8
    assert eases[-1] < 0.25


def test_easier_text_takes_wider_trees() -> None:
    planner = Planner(curve(c1=1.05, r8=1.6, r16=2.0), profile(0.5))
    widths = [planner._best(ease).tree.num_nodes(4) for ease in (0.2, 1.0, 2.0)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
