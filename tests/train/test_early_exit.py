"""The pruner: trained beside the streams without touching them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_specstream.model.backbone import Backbone
from mlx_specstream.train import trainer
from mlx_specstream.train.base import base_states, pad_texts
from mlx_specstream.train.early_exit import exit_rows
from mlx_specstream.train.objective import LosslessObjective
from mlx_specstream.train.options import TrainOptions
from mlx_specstream.train.vocabulary import VocabularySampler
from tests.support.engine import random_tensors, small_model, stream_config
from tests.train.plain import assert_close, everything, some_texts
from tests.train.tiny_run import QUICK, read_log, run_tiny


def test_its_gradients_are_the_plain_ones_and_streams_do_not_notice() -> None:
    backbone = Backbone(small_model(layers=3))
    config = stream_config()
    tensors = random_tensors(backbone, config)
    sampler = VocabularySampler.of_size(backbone.vocab_size, [], 0)
    options = TrainOptions(**QUICK)
    objective = LosslessObjective(backbone, config, options, sampler)
    batch = everything(some_texts())
    weights = objective.weights([batch])
    found = objective.gradients(tensors, batch, weights, objective.head(batch, 0)).gradients

    text, at, target = exit_rows(batch)
    base = base_states(backbone, pad_texts([s.example.tokens[:-1] for s in batch]), 2)
    main = base.first[mx.array(text), mx.array(at)]

    def plain(own: dict[str, mx.array]) -> mx.array:
        states = main + (main @ own["pruner.lora_a"]) @ own["pruner.lora_b"]
        logits = backbone.head(backbone.norm(states[None]))[0]
        return nn.losses.cross_entropy(logits, mx.array(target)).sum() * weights[0]

    own = {name: t for name, t in tensors.items() if name.startswith("pruner.")}
    assert_close({n: found[n] for n in own}, mx.grad(plain)(own), 2e-5)

    without = stream_config(pruner_rank=0)
    rest = {name: t for name, t in tensors.items() if name not in own}
    other = LosslessObjective(backbone, without, options, sampler)
    alone = other.gradients(rest, batch, weights, other.head(batch, 0)).gradients
    assert_close({n: found[n] for n in rest}, alone, 1e-6)


def test_it_learns(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "draw_own_curve", lambda folder: None)
    whole = {"batch_size": 10, "position_fraction": 1.0, "sampled_vocab": 0, "valid": []}
    run_tiny(tmp_path / "out", pruner_rank=8, iters=20, save_every=20, **whole)
    found = [r["early_exit"] for r in read_log(tmp_path / "out") if "early_exit" in r]
    assert found[-1] < found[0]
