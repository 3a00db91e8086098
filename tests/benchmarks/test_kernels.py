"""No step starts more kernels than it did when they were last counted: docs/performance.md."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks.kernels import kernels, of_mlx_lm, of_plain, of_step
from mlx_specstream.config import DecodeConfig
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.speculation import streams as streams_module
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.weights.checkpoint import load_streams
from mlx_specstream.weights.shipped import SHIPPED
from tests.support.engine import is_compiling
from tests.support.random_streams import random_tensors
from tests.support.tiny import tiny_model


@cache
def like_the_demo() -> nn.Module:
    """Return a model that is as deep as the demo's, and narrow."""
    model = tiny_model(num_hidden_layers=30, vocab_size=49152)
    mx.eval(model.parameters())
    return model


@cache
def prepared(name: str, merge: bool = True) -> Streams:
    backbone = Backbone(like_the_demo())
    config = load_streams(SHIPPED / name).config
    streams = Streams(backbone, config, random_tensors(backbone, config))
    with pytest.MonkeyPatch.context() as patch:
        if not merge:
            patch.setattr(streams_module, "MERGED_BYTES", 0)
        streams.prepare()
    mx.eval(streams.arrays)
    return streams


counted = pytest.mark.skipif(
    not is_compiling(), reason="no C++ compiler: MLX compiles nothing here"
)


def test_views_are_none_and_fused_operations_are_one() -> None:
    x, weight = mx.ones((4, 8)), mx.ones((8,))
    mx.eval(x, weight)
    found = kernels(lambda: [mx.fast.rms_norm(mx.exp(x)[1:].T.T, weight + 1, 1e-5)])
    assert found == {"Exp": 1, "Add": 1, "rms_norm": 1}
    assert mx.allclose(mx.fast.rms_norm(x, weight, 1e-5), x).item()


@counted
def test_a_plain_token_is_mlx_lms() -> None:
    theirs, ours = of_mlx_lm(like_the_demo()), of_plain(prepared("demo-chat").backbone)
    assert theirs.total() == 516  # 15.2 a layer, and 60 that put keys and values into the cache
    assert ours.total() <= theirs.total() + 2


@counted
@pytest.mark.parametrize(
    ("streams", "words", "merge", "most"),
    [
        ("demo-chat", "chain", True, 814),
        ("demo-chat", "16", True, 854),
        ("demo-chat", "16:8", True, 897),
        ("demo-chat", "chain", False, 946),
        ("demo-sql", "chain4", True, 807),
        ("demo-sql", "16", True, 879),
        ("demo-sql", "4 inline", True, 889),
    ],
)
def test_a_step(streams: str, words: str, merge: bool, most: int) -> None:
    found = of_step(prepared(streams, merge), DecodeConfig.parse(words))
    assert most - 20 <= found.total() <= most, found
