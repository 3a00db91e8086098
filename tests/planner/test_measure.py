"""Measuring: ratios that survive a drifting clock, budgets that hold, a cache that knows its own."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import mlx_specstream
from mlx_specstream.bench.planner_report import show
from mlx_specstream.commands.plan import build_parser as plan_parser
from mlx_specstream.config import DecodeConfig, PruneSpec, TreeSpec
from mlx_specstream.errors import OptionError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.machine import Machine
from mlx_specstream.machine.load import Watch
from mlx_specstream.planner import CostCurve, Growth, StepCost, StepSetting, costs, planner_for
from mlx_specstream.planner.acceptance import assumed_profile
from mlx_specstream.planner.adaptive import AutoDecoder
from mlx_specstream.planner.choose import forecasts
from mlx_specstream.planner.curve import BUDGET_S
from mlx_specstream.planner.identity import _ENGINE, identity, weight_bits
from mlx_specstream.planner.measure import CONTEXT, LONG_CONTEXT, measure
from mlx_specstream.planner.timing import PlainTokens, Steps
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from tests.support.engine import (
    decode,
    plain,
    random_streams,
    random_tensors,
    small_model,
    stream_config,
)
from tests.support.tiny_models import tiny_random_model

P = StepSetting.parse
TREES = [P(name) for name in ("4", "8", "chain3", "chain1", "16", "4 inline")]
COSTS = {"4": 1.5, "8": 2.0, "chain3": 1.4, "chain1": 1.2, "16": 4.0, "4 inline": 1.9}
RESTART = 1.15


@pytest.fixture
def streams() -> Streams:
    return random_streams(small_model(vocab=12), stream_config(num_streams=3))


@pytest.fixture
def joined(streams: Streams) -> StreamModel:
    return StreamModel(streams.backbone.model, streams.backbone, streams, "tiny", "")


class Scripted:
    """A machine whose every sample takes what `COSTS` says, times a drift; it notes what it ran.

    At the long context every row costs `longer` plain tokens more.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        drift: Iterator[float],
        token: float,
        longer: float = 0.0,
    ) -> None:
        self.now, self.drift, self.token = 0.0, drift, token
        self.ran: list[str] = []
        monkeypatch.setattr(PlainTokens, "__init__", lambda *_: None)

        def more(rows: int, at: int) -> float:
            return rows * longer if at == LONG_CONTEXT else 0.0

        monkeypatch.setattr(
            PlainTokens, "sample", lambda _, at: self.spend("plain", 1.0 + more(1, at), 5)
        )
        monkeypatch.setattr(Steps, "__init__", lambda me, _, plan, __: setattr(me, "plan", plan))
        monkeypatch.setattr(
            Steps,
            "sample",
            lambda me, at, n: self.spend(
                me.plan.name, COSTS[me.plan.name] + more(me.plan.rows(3), at), n
            ),
        )
        monkeypatch.setattr(Steps, "restart", lambda me, at: self.spend("restart", RESTART, 1))

    def spend(self, name: str, cost: float, number: int) -> float:
        self.ran.append(name)
        seconds = self.token * cost * next(self.drift)
        self.now += number * seconds
        return seconds

    def clock(self) -> float:
        return self.now


def test_a_clock_that_drifts_does_not_bend_the_curve(
    monkeypatch: pytest.MonkeyPatch, streams: Streams
) -> None:
    machine = Scripted(monkeypatch, (1 + 0.01 * n for n in count()), 0.001)
    curve = measure(streams, TREES, clock=machine.clock)
    assert curve is not None
    assert set(curve.steps) == set(TREES)
    for plan in TREES:
        assert curve.relative(plan) == pytest.approx(COSTS[plan.name], rel=0.03)
    assert curve.restart() == pytest.approx(RESTART, rel=0.03)
    assert CostCurve.from_dict(curve.to_dict()).restart() == pytest.approx(RESTART, rel=0.03)


def test_a_sudden_load_does_not_either(monkeypatch: pytest.MonkeyPatch, streams: Streams) -> None:
    machine = Scripted(monkeypatch, (3.0 if 30 < n < 45 else 1.0 for n in count()), 0.001)
    curve = measure(streams, TREES, clock=machine.clock)
    assert curve is not None
    for plan in TREES:
        assert curve.relative(plan) == pytest.approx(COSTS[plan.name], rel=0.02)


def test_attention_that_costs_by_the_row_is_seen(
    monkeypatch: pytest.MonkeyPatch, streams: Streams
) -> None:
    machine = Scripted(monkeypatch, (1 + 0.001 * n for n in count()), 0.001, longer=0.3)
    curve = measure(streams, TREES, clock=machine.clock)
    assert curve is not None
    curve = CostCurve.from_dict(curve.to_dict())
    for context, more in ((CONTEXT, 0.0), (LONG_CONTEXT, 1.0), (2 * LONG_CONTEXT - CONTEXT, 2.0)):
        for plan in TREES[:5]:
            expected = (COSTS[plan.name] + more * 0.3 * plan.rows(3)) / (1 + more * 0.3)
            assert curve.relative(plan, context) == pytest.approx(expected, rel=0.03)


def test_growth_is_no_noise() -> None:
    assert Growth.through(-1.0, {}) == Growth()
    assert Growth.through(1.0, {}).of(8) == 1.0
    assert Growth.through(1.0, {5: 3.0}) == Growth(1.0, 0.5, 0.5)
    assert Growth.through(2.0, {4: -1.0, 8: 1.0}) == Growth(2.0, 0.0, 0.125)
    assert Growth.through(2.0, {4: 3.0, 8: 2.0}) == Growth(2.0, 3.0, 0.0)
    steep = Growth.through(1.0, {4: 4.0, 8: 20.0})
    assert (steep.of(0), steep.of(8)) == (0.0, 20.0), (
        "a wide tree is not believed cheaper than seen"
    )


def test_what_cannot_win_is_left_alone(monkeypatch: pytest.MonkeyPatch, streams: Streams) -> None:
    machine = Scripted(monkeypatch, (1.0 for _ in count()), 0.001)
    tokens = {"4": 1.9, "8": 2.4, "chain3": 1.8, "chain1": 1.4, "16": 2.7, "4 inline": 1.9}
    curve = measure(streams, TREES, clock=machine.clock, tokens_per_step=lambda p: tokens[p.name])
    assert curve is not None
    # 8 rows: 1.2 tokens in the time of one; 16 rows: 0.68, so a warm-up, a sample, and no more.
    assert machine.ran.count("8") > 5
    assert machine.ran.count("16") == 2
    assert curve.steps[P("16")].samples == 1


def test_where_nothing_can_pay_little_is_measured(
    monkeypatch: pytest.MonkeyPatch, streams: Streams
) -> None:
    """A matrix library whose cost is in proportion to rows: one plan tells of all."""
    for name, cost in {"4": 6.5, "8": 10.5, "chain3": 6.4, "chain1": 4.5, "16": 18}.items():
        monkeypatch.setitem(COSTS, name, cost)
    machine = Scripted(monkeypatch, (1.0 for _ in count()), 0.001)
    curve = measure(streams, TREES, clock=machine.clock, tokens_per_step=lambda p: 2.0)
    assert curve is not None
    assert set(curve.steps) == {P("4")}
    assert len(machine.ran) < 25


def test_the_budget_holds(monkeypatch: pytest.MonkeyPatch, streams: Streams) -> None:
    for token, budget in ((0.05, 5.0), (0.5, 5.0), (0.05, 1.0)):
        machine = Scripted(monkeypatch, (1.0 for _ in count()), token)
        curve = measure(streams, TREES, clock=machine.clock, budget_s=budget)
        assert curve is not None
        # What has begun is finished: a plan's first samples, and the plain ones around them.
        assert machine.now < budget + 25 * token
        assert TREES[0] in curve.steps
        assert curve.complete == (set(curve.steps) == set(TREES))


def test_a_machine_too_busy_to_tell_is_measured_again_when_it_is_quiet(
    joined: StreamModel,
    measured: list[CostCurve],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    others = 1.5
    monkeypatch.setattr(Watch, "other_cores", property(lambda _: others))
    first = costs.step_costs(joined)
    assert first is not None
    assert first.busy
    assert "other programs kept 1.5 of" in caplog.text
    assert "uncertain; these costs are used, and measured again when it is quiet." in caplog.text
    path = costs.cached_at(identity(joined))
    others = 0.0
    assert costs.step_costs(joined) == first  # not in every run: that would be ten seconds each
    os.utime(path, (0, 0))
    others = 1.5
    assert costs.step_costs(joined) == first
    others = 0.0
    caplog.clear()
    again = costs.step_costs(joined)
    assert again is not None
    assert not again.busy
    assert len(measured) == 2
    assert "was measured while other programs ran; it is measured again" in caplog.text
    os.utime(path, (0, 0))
    assert costs.step_costs(joined) == again


def test_few_plans_are_kept_too(
    joined: StreamModel, measured: list[CostCurve], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow model has no more in ten seconds, and is not asked for them again."""
    cut = CostCurve(3, 256, StepCost(1.0), {P("4"): StepCost(1.5)}, complete=False)
    monkeypatch.setattr(costs, "measure", lambda *_, **__: measured.append(cut) or cut)
    assert costs.step_costs(joined) is not None
    assert costs.step_costs(joined) is not None
    assert len(measured) == 1


def test_another_matrix_library_is_measured_apart_and_says_so(
    joined: StreamModel,
    measured: list[CostCurve],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = costs.step_costs(joined)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    caplog.clear()
    costs.step_costs(joined)
    assert re.search(r"is known with .* on \d+ cores, and kept; measuring once", caplog.text)
    assert "(OPENBLAS_NUM_THREADS=7)." in caplog.text
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    assert costs.step_costs(joined) == before
    assert len(measured) == 2


def test_the_budget_is_the_same_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """What the help and the pages say is what measuring takes."""
    with pytest.raises(SystemExit):
        plan_parser().parse_args(["--help"])
    assert f"else {BUDGET_S:g})" in " ".join(capsys.readouterr().out.split())
    root = Path(__file__).parents[2]
    pages = "\n".join(path.read_text() for path in (root / "README.md", *root.glob("docs/*.md")))
    assert "ten seconds" in pages
    assert BUDGET_S == 10
    assert not re.search(r"(eight|8) seconds", pages)


def test_one_sample_has_no_uncertainty() -> None:
    curve = CostCurve(3, 256, StepCost(1.0, 0.02, 3), {P("4"): StepCost(1.5, 0.0, 1)}, busy=True)
    profile = assumed_profile(3)
    console = Console(width=80, file=io.StringIO())
    show(console, curve, profile, forecasts(curve, profile))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "1500.0 (once)" in text
    assert "1000.0 ± 2 %" in text
    assert "while other programs ran: uncertain" in text
    assert all(len(line) <= 80 for line in text.splitlines() if "│" in line)


def test_a_real_measurement(streams: Streams) -> None:
    """No assertion on speed: that everything runs, at two lengths, is what is tested."""
    shared = random_streams(small_model(vocab=12), stream_config(mode="shared", num_streams=3))
    for found, plans in ((streams, TREES[:3]), (shared, [P("chain inline")])):
        curve = measure(found, plans, budget_s=1.0, context=20)
        assert curve is not None
        assert plans[0] in curve.steps
        assert set(curve.steps) <= set(plans)
        assert all(cost.seconds > 0 for cost in (curve.plain, *curve.steps.values()))


@pytest.mark.parametrize(("token", "then"), [(0.001, 16), (0.01, 10), (0.02, 5), (0.2, 3)])
def test_more_plain_tokens_are_timed_where_they_are_short(
    token: float, then: int, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that takes a millisecond before the device begins is seen in the first token alone."""
    now, passes = 0.0, 0
    sampler = PlainTokens(streams.backbone, streams, lambda: now)
    original = sampler.decoder.steps

    def steps(*words: Any) -> Iterator[Any]:
        nonlocal now, passes
        passes, now = 0, now + 0.001
        for step in original(*words):
            passes, now = passes + 1, now + token
            yield step

    monkeypatch.setattr(sampler.decoder, "steps", steps)
    assert sampler.sample(8) == pytest.approx(token + 0.001 / 3)
    assert passes == 3
    assert sampler.sample(8) == pytest.approx(token + 0.001 / then)
    assert passes == then


def test_a_model_that_computes_nan_has_no_curve(streams: Streams) -> None:
    tensors = random_tensors(streams.backbone, streams.config)
    model = small_model(vocab=12, seed=9)
    model.model.norm.weight = model.model.norm.weight * float("nan")
    broken = random_streams(model, streams.config)
    assert tensors
    assert measure(broken, TREES[:1], budget_s=0.2, context=8) is None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[CostCurve]:
    """Turn measuring on, into an empty cache, with made-up results that are counted."""
    made: list[CostCurve] = []

    def fake(streams: Streams, plans: list[StepSetting], **_: object) -> CostCurve:
        made.append(
            CostCurve(streams.num_streams, 256, StepCost(1.0), {P("4"): StepCost(1.5 + len(made))})
        )
        return made[-1]

    monkeypatch.setenv("SPECSTREAM_PLAN_SECONDS", "1")
    monkeypatch.setenv("SPECSTREAM_CACHE", str(tmp_path))
    monkeypatch.setattr(costs, "measure", fake)
    return made


def test_costs_are_measured_once(
    joined: StreamModel, measured: list[CostCurve], caplog: pytest.LogCaptureFixture
) -> None:
    first = costs.step_costs(joined)
    assert first is not None
    assert costs.step_costs(joined) == first
    assert len(measured) == 1
    assert caplog.text.count("measuring once, for up to 1 seconds") == 1
    again = costs.step_costs(joined, refresh=True, announce=lambda _: None)
    assert again is not None
    assert again != first
    assert costs.step_costs(joined) == again


def test_costs_are_measured_with_the_weights_wired(
    joined: StreamModel, measured: list[CostCurve], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    @contextmanager
    def wired(module: object) -> Iterator[None]:
        assert module is joined.model
        seen.append("wired")
        yield
        seen.append("released")

    fake = costs.measure

    def measure_(*words: Any, **more: Any) -> CostCurve | None:
        seen.append("measured")
        return fake(*words, **more)

    monkeypatch.setattr(importlib.import_module("mlx_lm.generate"), "wired_limit", wired)
    monkeypatch.setattr(costs, "measure", measure_)
    costs.step_costs(joined)
    assert seen == ["wired", "measured", "released"]


def test_attention_is_asked_about_on_metal_alone(
    joined: StreamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {plan.name for plan in costs.model_plans(joined)}
    arguments = SimpleNamespace(num_attention_heads=14, num_key_value_heads=2, head_dim=64)
    monkeypatch.setattr(joined.model, "args", arguments)
    assert {plan.name for plan in costs.model_plans(joined)} == names
    monkeypatch.setattr(costs, "this_machine", lambda: Machine(backend="metal"))
    assert names - {plan.name for plan in costs.model_plans(joined)} >= {"5", "8"}
    inner = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    monkeypatch.setattr(joined.model, "args", SimpleNamespace(text_config=inner))
    left = {plan.name for plan in costs.model_plans(joined)}
    assert "8" in left
    assert not left & {"10", "16"}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": {}}', "nan"])
def test_a_damaged_cache_is_measured_again(
    damage: str, joined: StreamModel, measured: list[CostCurve]
) -> None:
    costs.step_costs(joined)
    path = costs.cached_at(identity(joined))
    if damage == "nan":
        damage = path.read_text().replace("1.5", "NaN")
    path.write_text(damage)
    assert costs.step_costs(joined) is not None
    assert len(measured) == 2


def test_anything_that_changes_costs_is_measured_anew(
    joined: StreamModel, measured: list[CostCurve], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs.step_costs(joined)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    costs.step_costs(joined)
    key = identity(joined)
    other = random_streams(joined.model, stream_config(num_streams=2))
    changed = identity(StreamModel(joined.model, other.backbone, other))
    assert len(measured) == 2
    assert {name for name in key if key[name] != changed[name]} == {"streams"}
    assert key["bits"] == weight_bits(joined.model) == 32
    assert json.loads(json.dumps(key)) == key


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    joined: StreamModel, measured: list[CostCurve], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECSTREAM_CACHE", str(tmp_path / "file"))
    assert costs.step_costs(joined) is not None
    assert costs.step_costs(joined) is not None
    assert len(measured) == 2


def test_a_planner_lives_with_its_model(joined: StreamModel, measured: list[CostCurve]) -> None:
    planner = planner_for(joined)
    assert planner is not None
    assert planner_for(joined) is planner
    assert planner_for(joined, DecodeConfig(schedule="deferred")) is not planner
    assert len(measured) == 1
    assert planner.plans == [P("4")]
    run = decode(AutoDecoder(joined.streams, DecodeConfig(), TokenSampler(), planner), [1, 2], 30)
    assert run.tokens[:30] == plain(joined.streams, [1, 2], 30).tokens[:30]  # type: ignore[arg-type]


def test_what_is_fixed_is_not_planned(
    joined: StreamModel, measured: list[CostCurve], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planner_for(joined, DecodeConfig(TreeSpec(rows=5))) is None
    assert planner_for(joined, DecodeConfig(prune=PruneSpec(2))) is None
    assert planner_for(joined, DecodeConfig(schedule="inline", stream_nodes=2)) is None
    assert planner_for(StreamModel(joined.model, joined.backbone)) is None
    monkeypatch.setenv("SPECSTREAM_PLAN_SECONDS", "0")
    assert planner_for(joined) is None
    assert measured == []
    monkeypatch.setenv("SPECSTREAM_PLAN_SECONDS", "soon")
    with pytest.raises(OptionError, match="SPECSTREAM_PLAN_SECONDS must be"):
        planner_for(joined)


def test_streams_that_know_the_next_token_are_planned_deferred(joined: StreamModel) -> None:
    assert joined.streams is not None
    assert "inline" in {plan.schedule for plan in costs.model_plans(joined)}
    backbone = joined.streams.backbone
    knowing = random_streams(backbone.model, stream_config(next_token_rank=3))
    plans = costs.model_plans(dataclasses.replace(joined, streams=knowing))
    assert {plan.schedule for plan in plans} == {"deferred"}


published_costs = costs.published_costs  # the real one, which `conftest.py` turns off


def test_published_figures_stand_in_until_something_is_measured(
    joined: StreamModel, measured: list[CostCurve], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a chip with published figures a plan is taken, and measured, by these."""
    monkeypatch.setattr(costs, "published_costs", published_costs)
    unknown = [plan.name for plan in costs.model_plans(joined)]
    for chip, backend, known in (("Apple M1", "metal", True), ("Apple M1", "cpu", False)):
        machine = Machine(chip=chip, backend=backend)
        monkeypatch.setattr(costs, "this_machine", lambda machine=machine: machine)
        assert (costs.published_costs(joined) is not None) is known
        order = [plan.name for plan in costs.model_plans(joined)]
        assert sorted(order) == sorted(unknown)
        assert (order[:4] == unknown[:4]) is not known
    monkeypatch.setattr(costs, "this_machine", lambda: Machine(chip="Apple M4", backend="metal"))
    monkeypatch.setenv("SPECSTREAM_PLAN_SECONDS", "0")
    planner = planner_for(joined)
    assert planner is not None
    assert planner.curve.source == "prior for M4, 32 bits"
    assert measured == []
    assert costs.has_experts(tiny_random_model("qwen3_moe"))
    assert not costs.has_experts(joined.model)


def test_costs_hold_for_the_sources_a_step_runs_through() -> None:
    package = Path(mlx_specstream.__file__).parent
    for name in _ENGINE:
        assert (package / name / "__init__.py").is_file()
