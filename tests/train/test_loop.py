"""The loop: loss falls, the base stays as it is, a killed run ends as the unbroken one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_specstream.commands.train import make_objective
from mlx_specstream.errors import OptionError, OutputError
from mlx_specstream.train import trainer
from mlx_specstream.train.optimizer import schedule
from mlx_specstream.train.options import TrainOptions
from mlx_specstream.train.state import STATE_FILE, load_state
from mlx_specstream.train.trainer import DivergenceError
from mlx_specstream.weights.checkpoint import load_streams
from tests.support.engine import small_model
from tests.support.tiny import tiny_model
from tests.train.tiny_run import VOCAB, own_texts, read_log, run_tiny, tiny_task


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(t) for name, t in load_streams(folder).tensors.items()}


def assert_identical(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "draw_own_curve", lambda folder: None)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    run_tiny(folder)
    return folder


def test_training_makes_drafts_right_and_leaves_the_base_alone(tmp_path) -> None:
    model = small_model(vocab=VOCAB, layers=3)
    before = {name: np.array(t) for name, t in tree_flatten(model.parameters())}
    figures = run_tiny(
        tmp_path / "out", iters=60, sampled_vocab=0, steps_per_eval=30, save_every=60,
        batch_size=10, valid=[], verdict_prompts=4, verdict_tokens=20,
    )  # fmt: skip
    after = {name: np.array(t) for name, t in tree_flatten(model.parameters())}
    assert_identical(after, before)
    records = [r for r in read_log(tmp_path / "out") if "loss" in r]
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    assert figures["after"]["chain"] > figures["before"]["chain"] + 0.3
    assert not (tmp_path / "out" / STATE_FILE).exists()
    assert (tmp_path / "out" / "train_log.jsonl").exists()


def test_a_quantised_base_trains_and_stays(tmp_path) -> None:
    model = tiny_model(num_hidden_layers=3, vocab_size=256)
    nn.quantize(model, group_size=32, bits=4)
    before = {name: np.array(t) for name, t in tree_flatten(model.parameters())}
    texts = [e for e in own_texts(small_model(vocab=VOCAB, layers=3)) if e]
    run_tiny(tmp_path / "out", model=model, train=texts, valid=[], iters=8, soft_targets=0.5)
    assert_identical({n: np.array(t) for n, t in tree_flatten(model.parameters())}, before)
    records = [r for r in read_log(tmp_path / "out") if "loss" in r]
    assert records[-1]["loss"] < records[0]["loss"]


def test_a_stopped_run_ends_as_the_unbroken_one(tmp_path, unbroken, monkeypatch) -> None:
    folder = tmp_path / "out"

    def stop_at(update: int) -> None:
        original = trainer.Trainer.make_update

        def stopping(self: trainer.Trainer) -> str:
            if self.progress.update == update:
                raise KeyboardInterrupt
            return original(self)

        monkeypatch.setattr(trainer.Trainer, "make_update", stopping)

    for update in (3, 7):
        stop_at(update)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(folder, resume=True)
        monkeypatch.undo()
    run_tiny(folder, resume=True)
    assert_identical(weights(folder), weights(unbroken))
    keep = ("batch", "loss", "marginal", "conditioned", "valid")
    logs = [[{k: r.get(k) for k in keep} for r in read_log(f)] for f in (folder, unbroken)]
    assert logs[0] == logs[1]


def kills(folder: Path, number: int, seed: int) -> int:
    """Run the program, killing it `number` times after random waits; return how many hit it."""
    waits, hits = random.Random(seed), 0
    command = [sys.executable, "-m", "tests.train.tiny_run", str(folder), "--resume"]
    root = Path(__file__).parents[2]
    for _ in range(number):
        process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
        # Wait for the run to be under way, then for a moment of anything it does.
        until = time.monotonic() + 60
        log = folder / "train_log.jsonl"
        size = log.stat().st_size if log.exists() else -1
        while process.poll() is None and time.monotonic() < until:
            if log.exists() and log.stat().st_size != size:
                break
            time.sleep(0.002)
        time.sleep(waits.uniform(0, 0.15))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            hits += 1
        process.wait()
    subprocess.run(command, cwd=root, check=True, stderr=subprocess.DEVNULL)
    return hits


def test_three_kills_and_the_weights_are_the_same(tmp_path, unbroken) -> None:
    assert kills(tmp_path / "out", 3, seed=1) >= 1
    assert_identical(weights(tmp_path / "out"), weights(unbroken))


@pytest.mark.slow
def test_twenty_kills_and_the_weights_are_the_same(tmp_path, unbroken) -> None:
    hits = 0
    for seed in range(6):
        hits += kills(tmp_path / f"out{seed}", 5, seed=seed)
        assert_identical(weights(tmp_path / f"out{seed}"), weights(unbroken))
        if hits >= 20:
            return
    assert hits >= 20


def test_accumulated_batches_are_one_batch(tmp_path, unbroken) -> None:
    texts = own_texts(small_model(vocab=VOCAB, layers=3))[:8]
    common = {"train": texts, "valid": [], "sampled_vocab": 0, "position_fraction": 1.0}
    run_tiny(tmp_path / "a", **common, iters=6, batch_size=8)
    run_tiny(tmp_path / "b", **common, iters=12, batch_size=4, grad_accumulation_steps=2)
    for name, value in weights(tmp_path / "b").items():
        assert np.allclose(value, weights(tmp_path / "a")[name], atol=2e-3), name


def test_not_a_number_stops_the_run_and_names_the_examples(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "out"
    task = tiny_task(folder)
    objective = trainer.LosslessObjective.gradients

    calls = []

    def broken(self, tensors, batch, weights, head):
        result = objective(self, tensors, batch, weights, head)
        calls.append(1)
        if len(calls) == 7:  # the first call is the estimate's
            result.gradients["stream_embeddings"] = result.gradients["stream_embeddings"] * mx.nan
        return result

    monkeypatch.setattr(trainer.LosslessObjective, "gradients", broken)
    with pytest.raises(DivergenceError, match=r"update 6, on line \d+; .*checkpoint is kept"):
        run_tiny(folder)
    assert task.start.keys() == weights(folder).keys()
    assert load_state(folder).progress.update == 5


def test_early_stopping_keeps_the_best(tmp_path) -> None:
    run_tiny(tmp_path / "out", iters=40, learning_rate=0.5, patience=2, steps_per_eval=2)
    checks = [r["valid"]["loss"] for r in read_log(tmp_path / "out") if "valid" in r]
    assert len(checks) < 20
    assert np.mean(checks[-1]) >= min(np.mean(c) for c in checks)


@pytest.mark.parametrize(
    ("patience", "update", "best"), [(0, 6, 5), (1, 3, 2), (2, 4, 2), (3, 6, 5), (9, 6, 5)]
)
def test_patience_is_counted_in_validations_without_a_gain(
    tmp_path, monkeypatch, patience, update, best
) -> None:
    losses = iter([3.0, 2.0, 2.0, 2.5, 1.0, 1.5])
    monkeypatch.setattr(trainer, "validate", lambda *_: {"loss": [next(losses)]})
    monkeypatch.setattr(trainer, "describe", lambda _: "")
    task = tiny_task(tmp_path / "out", iters=6, steps_per_eval=1, patience=patience)
    run = trainer.Trainer(task, make_objective(task))
    run.run()
    assert (run.progress.update, run.progress.best_update) == (update, best)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, unbroken, monkeypatch) -> None:
    with pytest.raises(OptionError, match="is not empty and is left as it is"):
        run_tiny(unbroken)
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_finish", lambda self: {})
        run_tiny(folder)
    with pytest.raises(OptionError, match="add --resume"):
        run_tiny(folder)
    with pytest.raises(OptionError, match=r"--learning-rate was 0\.002 and is now 0\.1"):
        run_tiny(folder, resume=True, learning_rate=0.1)
    with pytest.raises(OptionError, match="other data"):
        run_tiny(folder, resume=True, valid=[])
    (folder / STATE_FILE).write_bytes(b"no such thing")
    with pytest.raises(OutputError, match="is damaged"):
        run_tiny(folder, resume=True)


def test_the_paper_preset_has_the_papers_parameter_count() -> None:
    from mlx_specstream.train.options import PRESETS, TrainOptions
    from mlx_specstream.weights.fingerprint import BaseDims
    from mlx_specstream.weights.stream_tensors import stream_shapes

    h = 4096
    modules = {f"self_attn.{m}_proj": (h, h) for m in "qkvo"}
    config = TrainOptions(**PRESETS["paper"]).stream_config(32, tuple(modules))
    shapes = stream_shapes(config, BaseDims(h, 32, 32, modules))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 540_672


def test_log_lines_are_json(unbroken) -> None:
    lines = (unbroken / "train_log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["update"] for r in records if "update" in r] == list(range(1, 13))
    assert {"before", "after"} == set(records[-1]["verdict"])


def test_a_run_by_the_clock_ends_with_its_minutes(tmp_path) -> None:
    run_tiny(tmp_path / "out", iters=100_000, max_minutes=0.02, steps_per_eval=0)
    records = [r for r in read_log(tmp_path / "out") if "loss" in r]
    # The last update alone goes beyond the 1.2 seconds.
    assert records[-1]["elapsed_s"] >= 1.1
    assert all(record["elapsed_s"] < 1.2 for record in records[:-1])
    assert len([r for r in read_log(tmp_path / "out") if "valid" in r]) == 1
    assert not (tmp_path / "out" / STATE_FILE).exists()


def test_by_the_clock_the_rate_decays_with_the_time_spent() -> None:
    options = TrainOptions(max_minutes=2.0, warmup=4, final_lr=0.05, iters=100_000)
    factors = [schedule(options, 9, seconds) for seconds in (0.0, 60.0, 120.0, 150.0)]
    assert factors == pytest.approx([1.0, 0.525, 0.05, 0.05], abs=1e-3)
    assert schedule(options, 0, 60.0) == pytest.approx(0.525 / 4, abs=1e-3)


def test_streams_without_a_state_are_a_finished_run(tmp_path, monkeypatch) -> None:
    """A kill between the first state and the first streams leaves the state alone."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_streams", killed)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "out")
    assert (tmp_path / "out" / STATE_FILE).exists()
    assert not (tmp_path / "out" / "streams_config.json").exists()
