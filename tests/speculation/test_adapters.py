"""Adapters in few kernels: the same rows, whether products are joined, merged, or neither."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_specstream.model.backbone import Backbone
from mlx_specstream.speculation import streams as module
from mlx_specstream.speculation.adapters import StreamLinear
from mlx_specstream.speculation.streams import Streams
from tests.speculation.test_streams import PREFIX, verify
from tests.support.engine import random_tensors, small_model, stream_config
from tests.support.tiny import tiny_model


def made(mode: str = "lossless", model: nn.Module | None = None) -> Streams:
    model = model or small_model(layers=3, seed=1)
    backbone, config = Backbone(model), stream_config(mode=mode)
    return Streams(backbone, config, random_tensors(backbone, config))


def quantised() -> nn.Module:
    model = tiny_model(num_hidden_layers=3)
    nn.quantize(model, group_size=32, bits=8)
    return model


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("inline", [True, False])
def test_prepared_streams_are_the_same_and_main_rows_bit_for_bit(
    inline: bool, merge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not merge:
        monkeypatch.setattr(module, "MERGED_BYTES", 0)
    before, streams = made(), made()
    streams.prepare()
    assert bool(streams.apart) == merge
    (main, rows), (wanted_main, wanted) = (verify(s, PREFIX, inline) for s in (streams, before))
    assert np.array_equal(main, wanted_main)
    np.testing.assert_allclose(rows, wanted, atol=2e-5, rtol=1e-4)
    assert np.abs(rows - verify(without_adapters(), PREFIX, inline)[1]).max() > 0.1


def without_adapters() -> Streams:
    streams = made()
    for layer in streams.layers:
        for one in layer.modules():
            if isinstance(one, StreamLinear):
                one.lora_b = mx.zeros_like(one.lora_b)
    return streams


@pytest.mark.parametrize(
    ("streams", "limit"),
    [(lambda: made("shared"), 1 << 30), (lambda: made(model=quantised()), 1 << 30), (made, 1000)],
)
def test_what_is_not_merged_is_joined(
    streams: Callable[[], Streams], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared adapters act on every row; quantised weights have no room for B·A; others are large."""
    monkeypatch.setattr(module, "MERGED_BYTES", limit)
    before, prepared = streams(), streams()
    prepared.prepare()
    assert prepared.apart == []
    assert len(prepared.joined) == 2 * sum(
        any(isinstance(one, StreamLinear) for one in layer.modules()) for layer in prepared.layers
    )
    inline = prepared.shared
    for found, wanted in zip(
        verify(prepared, PREFIX, inline), verify(before, PREFIX, inline), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4)


def test_the_user_keeps_the_weights_of_the_model() -> None:
    model = small_model(layers=3, seed=1)
    before = model(mx.array([PREFIX]))
    made(model=model).prepare()
    assert mx.array_equal(model(mx.array([PREFIX])), before)


def test_a_joined_product_holds_no_rows_after_its_last_reader() -> None:
    streams = made()
    streams.prepare()
    verify(streams, PREFIX, inline=True)
    inner = [
        one.inner
        for layer in streams.layers
        for one in layer.modules()
        if isinstance(one, StreamLinear) and one.inner is not None
    ]
    assert inner
    assert all(one.rows is None for one in inner)


def test_all_that_decoding_uses_is_ready_once_loaded() -> None:
    """What is still lazy could be computed in the thread that loaded it alone."""
    streams = made()
    streams.prepare()
    of_conditioner = streams.conditioner.by_source.arrays
    assert {id(array) for array in of_conditioner} <= {id(array) for array in streams.arrays}
    assert {id(array) for array in streams.joined} <= {id(array) for array in streams.arrays}
