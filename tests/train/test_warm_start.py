"""Runs that start from trained streams: the pruner alone, and shared mode opened gently."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.commands.train import make_objective
from mlx_specstream.errors import OptionError
from mlx_specstream.train import trainer
from mlx_specstream.train.compare import base_loss
from mlx_specstream.train.initialise import with_next_token
from mlx_specstream.train.trainer import Trainer
from mlx_specstream.train.warm_start import PRUNER_RANK, warm_start
from mlx_specstream.weights.checkpoint import load_streams
from tests.train.tiny_run import read_log, run_tiny, tiny_task


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "draw_own_curve", lambda folder: None)


@pytest.fixture(scope="module")
def lossless(tmp_path_factory):
    """Streams of a short run, whose adapters are no longer zero."""
    folder = tmp_path_factory.mktemp("lossless") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_own_curve", lambda folder: None)
        run_tiny(folder, iters=4, steps_per_eval=0)
    return load_streams(folder)


def taken(task, given):
    config, start = warm_start(given, task.options, task.backbone, task.rms)
    return dataclasses.replace(task, config=config, start=start)


def test_the_pruner_alone_is_trained_and_calibrated(tmp_path, lossless) -> None:
    fields = {"part": "pruner", "iters": 16, "position_fraction": 1.0, "weight_decay": 0.1}
    task = taken(tiny_task(tmp_path / "out", verdict_tokens=16, **fields), lossless)
    assert task.config.pruner_rank == PRUNER_RANK
    Trainer(task, make_objective(task)).run()
    found = load_streams(tmp_path / "out")
    for name, tensor in lossless.tensors.items():
        assert mx.array_equal(found.tensors[name], tensor), name
    assert mx.abs(found.tensors["pruner.lora_b"]).max().item() > 0
    assert float(found.metadata["prune_kept"]) >= 0.99
    log = read_log(tmp_path / "out")
    checks = [record["valid"] for record in log if "valid" in record]
    assert checks[-1]["loss"][0] < checks[0]["loss"][0]
    assert set(checks[0]) == {"positions", "loss", "exit_top1", "exit_top3"}


def test_shared_mode_begins_as_the_base_model_does(tmp_path, lossless) -> None:
    task = tiny_task(tmp_path / "out", mode="shared", start_scale=0.0, gate_start=-50.0, iters=1)
    started = taken(task, lossless)
    assert started.config.mode == "shared"
    assert started.config.pruner_rank == 0
    assert "layers.0.self_attn.q_proj.lora_a" in started.start
    embeddings = started.start["stream_embeddings"]
    assert mx.array_equal(embeddings, lossless.tensors["stream_embeddings"])
    texts = [trainer.select(example, 1.0, (0,)) for example in task.valid]
    assert make_objective(started).main_loss(started.start, texts) == pytest.approx(
        base_loss(task), abs=1e-4
    )

    halved = taken(tiny_task(tmp_path / "out", mode="shared", start_scale=0.5), lossless)
    name = "layers.2.mlp.down_proj.lora_b"
    assert mx.array_equal(halved.start[name], lossless.tensors[name] * 0.5)
    figures = Trainer(halved, make_objective(halved)).run()
    assert figures["after"]["chain"] >= 1


def test_shared_streams_do_not_become_lossless(tmp_path, lossless) -> None:
    config = dataclasses.replace(lossless.config, mode="shared")
    given = dataclasses.replace(lossless, config=config)
    with pytest.raises(OptionError, match="add --mode shared"):
        taken(tiny_task(tmp_path / "out"), given)


def test_a_pruner_may_be_added_to_streams_that_train_on(tmp_path, lossless) -> None:
    task = taken(tiny_task(tmp_path / "out", pruner_rank=3), lossless)
    assert task.start["pruner.lora_a"].shape[1] == 3
    assert task.config.mode == "lossless"


def test_knowledge_of_the_next_token_may_be_added_and_is_fitted(tmp_path, lossless) -> None:
    before = taken(tiny_task(tmp_path / "out"), lossless)
    fields = {"next_token_rank": 3, "conditioner_tokens": 2}
    task = taken(tiny_task(tmp_path / "out", **fields), lossless)
    assert (task.config.next_token_rank, task.config.conditioner_tokens) == (3, 2)
    texts = [trainer.select(example, 1.0, (0,)) for example in task.valid]
    found, wanted = [make_objective(each).measure(each.start, texts) for each in (task, before)]
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, atol=1e-4)
        assert np.array_equal(ours.conditioned, theirs.conditioned)
    fitted = with_next_token(task.start, task.backbone, task.config, [e.tokens for e in task.train])
    assert mx.abs(fitted["next_token.lora_b"]).max() > 0
    again = with_next_token(fitted, task.backbone, task.config, [])
    assert again["next_token.lora_b"] is fitted["next_token.lora_b"]
    with pytest.raises(OptionError, match="know the next token"):
        given = dataclasses.replace(lossless, config=task.config)
        taken(tiny_task(tmp_path / "out", mode="shared"), given)
