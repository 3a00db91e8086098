"""The planner among processes: what it chooses follows what messages cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.stages import Stages
from mlx_specstream.planner import (
    CostCurve,
    Forecast,
    StepCost,
    StepSetting,
    candidates,
    chosen,
    costs,
    forecasts,
    measure,
    messages,
)
from mlx_specstream.planner.acceptance import assumed_profile
from tests.support.engine import random_streams, stream_config
from tests.support.tiny import tiny_model

PASS_S, ROW_S = 60e-6, 40e-6  # of a part between two messages, beside what the message costs
ROWS = (2, 3, 4, 5, 6, 8, 12, 16)


@dataclass
class DelayedGroup:
    """Stands in for the processes: every sum comes late, and time passes with messages alone."""

    delay_s: float
    now: float = 0.0
    sums: int = 0

    def all_sum(self, x: mx.array, **_: Any) -> mx.array:
        self.sums += 1
        self.now += self.delay_s + PASS_S + ROW_S * x.shape[-2]
        return x


def measured(monkeypatch: pytest.MonkeyPatch, delay_us: float) -> tuple[CostCurve, Forecast]:
    """Return the cost curve of a sharded model by real passes, and what is chosen by it."""
    group = DelayedGroup(delay_us * 1e-6)
    model = tiny_model("llama", num_hidden_layers=5, vocab_size=12)
    model.shard(mx.distributed.init())  # one process: the layers are whole, and sum all the same
    monkeypatch.setattr(mx.distributed, "all_sum", group.all_sum)
    streams = random_streams(model, stream_config(num_streams=4, num_msa_layers=2))
    profile = assumed_profile(4)
    plans = [plan for plan in candidates(4, "lossless") if plan.rows(4) in ROWS]
    curve = measure(
        streams, plans, tokens_per_step=profile.tokens_per_step, clock=lambda: group.now
    )
    assert curve is not None
    assert group.sums > 1000
    return curve, chosen(forecasts(curve, profile))


def test_slow_messages_make_wider_trees_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [measured(monkeypatch, delay) for delay in (0, 50, 200, 1000)]
    tokens = [curve.plain.seconds for curve, _ in found]
    # Ten messages a token; what is timed holds them all.
    assert tokens == pytest.approx([10 * (d + 100e-6) for d in (0, 50e-6, 200e-6, 1e-3)])
    gains = [best.speedup for _, best in found]
    assert gains == sorted(gains)
    assert gains[-1] > 1.4 * gains[0]
    rows = [1 if best.plan is None else best.plan.rows(4) for _, best in found]
    assert rows == sorted(rows)
    assert rows[-1] > rows[0]


def test_the_undelayed_choice_is_the_worse_one_where_messages_are_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (_, quick), (slow_curve, slow) = (measured(monkeypatch, delay) for delay in (0, 1000))
    rated = forecasts(slow_curve, assumed_profile(4), plans=[p for p in [quick.plan] if p])
    assert slow.speedup > 1.2 * max(f.speedup for f in rated if f.plan == quick.plan)


def test_costs_measured_with_other_messages_do_not_hold() -> None:
    curve = CostCurve(4, 256, StepCost(0.05), {}, message_s=1e-4)
    assert not messages.has_changed(curve, 1.5e-4, 60)
    assert messages.has_changed(curve, 3e-4, 60)
    assert messages.has_changed(dataclasses.replace(curve, message_s=1e-3), 1e-4, 60)
    assert not messages.has_changed(curve, 3e-4, 2)  # in stages, there are few
    assert CostCurve.from_dict(curve.to_dict()).message_s == 1e-4


def test_one_process_sends_nothing_and_stages_send_one_each() -> None:
    backbone = Backbone(tiny_model("llama"))
    assert messages.message_s(backbone) == 0.0
    assert messages.messages_per_pass(backbone) == 0
    backbone.stages = Stages((2, 4), group=mx.distributed.init())
    assert messages.messages_per_pass(backbone) == 2


def test_another_network_is_measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECSTREAM_CACHE", str(tmp_path))
    model = tiny_model("llama", vocab_size=12)
    streams = random_streams(model, stream_config(num_streams=3))
    joined = StreamModel(model, streams.backbone, streams, "tiny", "")
    now, taken = [0.0], []

    def measuring(*_: Any, **__: Any) -> CostCurve:
        taken.append(now[0])
        return CostCurve(3, 256, StepCost(0.01), {StepSetting.parse("4"): StepCost(0.02)})

    monkeypatch.setattr(costs, "measure", measuring)
    monkeypatch.setattr(costs, "message_s", lambda _: now[0])
    monkeypatch.setattr(costs, "messages_per_pass", lambda _: 10)
    said: list[str] = []
    for now[0] in (1e-4, 1.1e-4, 1e-3, 1e-3, 1e-4):
        costs.step_costs(joined, budget_s=1.0, announce=said.append)
    assert taken == [1e-4, 1e-3, 1e-4]
    assert "was measured with faster or slower messages" in said[-1] + said[-2]
