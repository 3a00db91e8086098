"""Segments hold less in memory than all streams of a text in one attention, for the same loss."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_specstream.model.backbone import Backbone
from mlx_specstream.train.objective import LosslessObjective
from mlx_specstream.train.options import TrainOptions
from mlx_specstream.train.vocabulary import VocabularySampler
from tests.support.engine import random_tensors, small_model, stream_config
from tests.train.plain import everything, some_texts


def peak_bytes(length: int, **options: int) -> tuple[int, float]:
    backbone = Backbone(small_model(layers=3))
    config = stream_config(num_streams=4, pruner_rank=0)
    tensors = random_tensors(backbone, config)
    sampler = VocabularySampler.of_size(backbone.vocab_size, [], 0)
    objective = LosslessObjective(backbone, config, TrainOptions(**options), sampler)
    batch = everything(some_texts(lengths=(length,)))
    weights, head = objective.weights([batch]), objective.head(batch, 0)
    mx.eval(tensors)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    result = objective.gradients(tensors, batch, weights, head)
    return mx.get_peak_memory() - before, result.total


def test_peak_memory_grows_with_the_length_and_not_with_its_square() -> None:
    segments = [peak_bytes(n, segment_size=16, rows_per_pass=512) for n in (128, 256, 512)]
    naive = [peak_bytes(n, segment_size=n, rows_per_pass=10**9) for n in (128, 256, 512)]
    for (_, loss), (_, same) in zip(segments, naive, strict=True):
        assert loss == pytest.approx(same, rel=1e-4)
    ours, theirs = (np.array([size for size, _ in rows]) for rows in (segments, naive))
    assert theirs[-1] / theirs[-2] > 3
    assert ours[-1] / ours[-2] < 2.5
    assert ours[-1] < theirs[-1] / 5
