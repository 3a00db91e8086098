"""Shared mode: the training forward is the engine's, gradients are slopes, both losses fall."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.config import TreeSpec
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.step import Stepper
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.speculation.tree import root_only
from mlx_specstream.train import trainer
from mlx_specstream.train.head import Head
from mlx_specstream.train.options import TrainOptions
from mlx_specstream.train.shared import SharedObjective, joint_states
from mlx_specstream.train.vocabulary import VocabularySampler
from tests.support.engine import random_tensors, small_model, stream_config
from tests.train.plain import assert_close, everything, some_texts
from tests.train.tiny_run import QUICK, read_log, run_tiny


def shared_tensors(backbone: Backbone, config) -> dict[str, mx.array]:
    tensors = random_tensors(backbone, config)
    for index in range(backbone.num_layers - config.num_msa_layers, backbone.num_layers):
        gate = mx.random.normal((4,), key=mx.random.key(index))
        tensors[f"layers.{index}.stream_gate"] = gate
    return tensors


@pytest.mark.parametrize("fields", [{}, {"rope_offset": "position", "value_rotation": 0.05}])
def test_the_training_forward_is_the_engines(fields) -> None:
    model = small_model("llama", layers=3)
    backbone = Backbone(model)
    config = stream_config(mode="shared", pruner_rank=0, **fields)
    streams = Streams(backbone, config, shared_tensors(backbone, config))
    batch = everything(some_texts())
    states = joint_states(streams, batch, 3)
    segments = states.main.shape[1] // 3
    stepper = Stepper(
        streams, TreeSpec("chain", branching=1), inline=True, token_sampler=TokenSampler()
    )
    for number, selection in enumerate(batch):
        tokens, first = selection.example.tokens, selection.example.prompt_length - 1
        cache = KVCache(backbone.num_layers)
        streams.forward(mx.array(tokens[:first]), cache)
        cache.advance(first)
        for t in range(first, len(tokens) - 1):
            verified = stepper.verify(root_only(mx.array([tokens[t]])), cache)
            mx.eval(cache.arrays)
            cache.advance(1)
            own = states.streams[number * segments + t // 3, t % 3]
            assert mx.allclose(states.main[number, t], verified.last[0, 0], atol=3e-5)
            assert mx.allclose(own, backbone.norm(verified.streams)[0, 0], atol=3e-5)


def test_gradients_are_the_slopes_of_the_loss() -> None:
    backbone = Backbone(small_model("llama", layers=3))
    config = stream_config(mode="shared", pruner_rank=0)
    tensors = shared_tensors(backbone, config)
    options = TrainOptions(**{**QUICK, "mode": "shared"})
    objective = SharedObjective(
        backbone, config, options, VocabularySampler.of_size(backbone.vocab_size, [], 0)
    )
    batch = everything(some_texts())
    weights = objective.weights([batch])
    head = Head(backbone)
    result = objective.gradients(tensors, batch, weights, head)
    rows = objective.gradients(tensors, batch[:1], weights, head).total
    assert 0 < rows < result.total
    for name in ("layers.1.stream_gate", "layers.0.mlp.up_proj.lora_a", "stream_embeddings"):
        slope = result.gradients[name]
        step = 1e-2 * slope / mx.linalg.norm(slope)
        sides = [
            objective.gradients(
                {**tensors, name: tensors[name] + sign * step}, batch, weights, head
            )
            for sign in (1, -1)
        ]
        found = (sides[0].total - sides[1].total) / 2e-2
        assert found == pytest.approx(mx.linalg.norm(slope).item(), rel=0.02), name


def test_recomputing_layers_changes_nothing() -> None:
    backbone = Backbone(small_model("llama", layers=3))
    config = stream_config(mode="shared", pruner_rank=0)
    tensors, batch = shared_tensors(backbone, config), everything(some_texts())
    sampler, found = VocabularySampler.of_size(backbone.vocab_size, [], 0), []
    for again in (False, True):
        options = TrainOptions(**{**QUICK, "mode": "shared", "grad_checkpoint": again})
        objective = SharedObjective(backbone, config, options, sampler)
        weights = objective.weights([batch])
        found.append(objective.gradients(tensors, batch, weights, Head(backbone)).gradients)
    assert_close(found[1], found[0], 1e-5)
    assert mx.abs(found[0]["layers.1.stream_gate"]).max().item() > 1e-3


def test_both_losses_fall(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "draw_own_curve", lambda folder: None)
    run_tiny(
        tmp_path / "out", mode="shared", iters=30, valid=[], steps_per_eval=0, sampled_vocab=0,
        save_every=30, alpha_decay=1.0,
    )  # fmt: skip
    records = [r for r in read_log(tmp_path / "out") if "loss" in r]
    assert records[-1]["main"] < records[0]["main"]
    assert np.mean(records[-1]["marginal"]) < np.mean(records[0]["marginal"])
