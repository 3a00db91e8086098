"""The pruning threshold keeps what would be accepted; shared mode is compared with plain LoRA."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_specstream.commands.train import comparison, make_objective
from mlx_specstream.train import trainer
from mlx_specstream.train.calibrate import threshold_of
from mlx_specstream.train.trainer import Trainer
from mlx_specstream.weights.checkpoint import load_streams
from tests.train.tiny_run import run_tiny, tiny_task


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "draw_own_curve", lambda folder: None)


def test_the_threshold_keeps_its_share() -> None:
    scores = list(np.log(np.linspace(0.001, 1, 1000)))
    threshold, kept = threshold_of(scores)
    assert 0.99 <= kept <= 0.992
    assert threshold == pytest.approx(0.011, rel=0.02)
    assert threshold_of([]) == (0.0, 1.0)
    assert threshold_of([math.log(0.25)] * 3) == (0.25, 1.0)


def test_a_trained_pruner_comes_with_its_threshold(tmp_path) -> None:
    run_tiny(tmp_path / "out", pruner_rank=4, iters=6, verdict_tokens=16)
    told = load_streams(tmp_path / "out").metadata
    assert float(told["prune_kept"]) >= 0.99
    assert 0 <= float(told["prune_threshold"]) <= 1


def test_shared_mode_is_compared_with_plain_lora(tmp_path) -> None:
    task = tiny_task(tmp_path / "out", mode="shared", iters=12, steps_per_eval=0, save_every=12)
    trainer = Trainer(task, make_objective(task))
    trainer.run()
    words = comparison(trainer).removesuffix(".").replace(",", "").split()
    shared, plain, base = (float(words[i]) for i in (6, 13, 17))
    assert plain < base
    assert shared < base
