from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from mlx_specstream.errors import ModelError
from mlx_specstream.model.backbone import Backbone, RowRope
from mlx_specstream.model.cache import KVCache
from mlx_specstream.model.probe import check_backbone
from tests.support import tiny
from tests.support.engine import (
    mlx_lm_tokens,
    plain,
    random_streams,
    small_model,
    stream_config,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.0}
ROPES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "llama3": LLAMA3,
    "linear": LINEAR,
    "yarn": YARN,
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_seen_rightly(family: str, tied: bool, dtype: mx.Dtype) -> None:
    model = tiny.tiny_model(family, tie_word_embeddings=tied, num_hidden_layers=3)
    model.set_dtype(dtype)
    backbone = Backbone(model)
    assert (backbone.num_layers, backbone.hidden_size, backbone.vocab_size) == (3, 64, 256)
    assert backbone.dtype == dtype
    check_backbone(backbone)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_quantised_models_are_seen_rightly(bits: int, tied: bool, dtype: mx.Dtype) -> None:
    model = tiny.tiny_model("qwen3", tie_word_embeddings=tied, intermediate_size=128)
    model.set_dtype(dtype)
    nn.quantize(model, group_size=32, bits=bits)
    backbone = Backbone(model)
    assert backbone.dtype == dtype
    check_backbone(backbone)
    assert backbone.hidden_size == 64


@pytest.mark.parametrize("scaling", list(ROPES))
@pytest.mark.parametrize("traditional", [False, True])
def test_rope_variants_are_seen_rightly(scaling: str, traditional: bool) -> None:
    model = tiny.tiny_model(rope_scaling=ROPES[scaling], rope_traditional=traditional)
    check_backbone(Backbone(model))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("scaling", list(ROPES))
def test_rope_by_row_is_bit_equal_to_a_call_per_row(scaling: str, dtype: mx.Dtype) -> None:
    rope = initialize_rope(16, 10000.0, False, ROPES[scaling], 256)
    x = mx.random.normal((1, 3, 7, 16), key=mx.random.key(0)).astype(dtype)
    positions = [0, 300, 7, 7, 31, 2, 1000]
    before = mx.array(x)
    found = RowRope(rope)(x, offset=mx.array(positions, dtype=mx.int32))
    assert found.shape == x.shape
    assert found.dtype == dtype
    for row, position in enumerate(positions):
        alone = rope(mx.array(x[:, :, row : row + 1]), offset=position)
        assert mx.array_equal(found[:, :, row : row + 1], alone)
    assert mx.array_equal(x, before)
    whole = RowRope(rope)(mx.array(x), offset=5)
    assert mx.array_equal(whole, rope(mx.array(x), offset=5))


def test_rope_by_row_in_a_batch() -> None:
    rope, x = nn.RoPE(8), mx.random.normal((2, 2, 3, 8), key=mx.random.key(0))
    positions = mx.array([[3, 9, 4], [0, 1, 70]])
    found = RowRope(rope)(x, offset=positions)
    for b in range(2):
        alone = RowRope(rope)(x[b : b + 1], offset=positions[b])
        assert mx.array_equal(found[b : b + 1], alone)
    with pytest.raises(ModelError, match="2 x 3 rows are 3 in number"):
        RowRope(rope)(x, offset=mx.arange(3))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_forward_is_mlx_lms(family: str) -> None:
    model = tiny.tiny_model(family)
    backbone, cache = Backbone(model), KVCache(4)
    tokens = mx.array([int(t) for t in np.random.default_rng(1).integers(0, 256, 40)])
    rows = []
    for part in (tokens[:17], tokens[17:18], tokens[18:40]):
        rows.append(backbone.logits(backbone.forward(part, cache, last_only=False)))
        cache.advance(part.shape[0])
    expected = np.array(model(tokens[None])[0])
    np.testing.assert_allclose(np.array(mx.concatenate(rows)), expected, atol=2e-4, rtol=1e-4)
    cache.rewind(39)
    last = backbone.logits(backbone.forward(tokens[39:], cache))
    np.testing.assert_allclose(np.array(last), expected[39:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_head_rows_are_the_heads(tied: bool, quantised: bool) -> None:
    model = tiny.tiny_model(tie_word_embeddings=tied, num_hidden_layers=1)
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    backbone = Backbone(model)
    x = mx.random.normal((5, 64), key=mx.random.key(3))
    tokens = mx.array([0, 255, 17, 17])
    few, all_logits = x @ backbone.head_rows(tokens).T, backbone.head(x[None])[0]
    np.testing.assert_allclose(np.array(few), np.array(all_logits[:, tokens]), atol=1e-4)
    embedded = np.array(backbone.embedding_rows(tokens))
    np.testing.assert_array_equal(embedded, np.array(backbone.embed(tokens)[0]))


@pytest.mark.parametrize("window", [1, 3, 5])
def test_sliding_windows_beyond_their_end(window: int) -> None:
    """Plain decoding through the view, against mlx-lm with its own rotating cache."""
    model = small_model(layers=4, vocab=40, window=window, seed=3)
    check_backbone(Backbone(model))
    streams = random_streams(model, stream_config())
    prompt = [int(t) for t in np.random.default_rng(2).integers(0, 40, 9)]
    expected = mlx_lm_tokens(model, prompt, 30)
    assert len(set(expected)) > 4, expected
    assert plain(streams, prompt, 30).tokens == expected
    # The reference does not see it if the windows do nothing.
    full = small_model(layers=4, vocab=40, seed=3)
    assert mlx_lm_tokens(full, prompt, 30) != expected


class Shifted(nn.Module):
    """A RoPE under another name, which the view does not know as one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if isinstance(offset, mx.array):
            offset = int(offset[0].item())
        return self.inner(x, offset=offset)


def _hidden_rope(layer: nn.Module) -> None:
    layer.self_attn.rope = Shifted(layer.self_attn.rope)


def _blind(layer: nn.Module) -> None:
    """Ignore the mask, as a layer that makes its own would."""

    class Blind(type(layer)):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            return super().__call__(x, "causal" if x.shape[1] > 1 else None, cache)

    layer.__class__ = Blind


def _own_positions(layer: nn.Module) -> None:
    """Count positions itself, as layers with learned embeddings do."""

    class Counting(type(layer)):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            x = x + 0.1 * mx.arange(x.shape[1])[None, :, None]
            return super().__call__(x, mask, cache)

    layer.__class__ = Counting


@pytest.mark.parametrize("broken", [_hidden_rope, _blind, _own_positions])
def test_layers_that_compute_something_else_are_refused(broken: Any) -> None:
    model = tiny.tiny_model(seed=5)
    check_backbone(Backbone(model))
    broken(model.layers[2])
    with pytest.raises(ModelError, match="does not compute the same through") as caught:
        check_backbone(Backbone(model))
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_called_so() -> None:
    model = tiny.tiny_model(num_hidden_layers=2)
    model.layers[1].mlp.down_proj.weight = mx.full((64, 96), float("nan"))
    with pytest.raises(ModelError, match="not a number"):
        check_backbone(Backbone(model))


def test_views_share_weights_with_the_model() -> None:
    model = tiny.tiny_model(num_hidden_layers=2)
    backbone = Backbone(model)
    for ours, theirs in zip(backbone.layers, model.layers, strict=True):
        assert ours.mlp.up_proj.weight is theirs.mlp.up_proj.weight
        assert isinstance(ours.self_attn.rope, RowRope)
        assert isinstance(theirs.self_attn.rope, nn.RoPE)


def test_plain_decoding_of_a_text_in_shared_mode_differs_from_the_base() -> None:
    """A guard of the other tests: adapters of shared mode do change the model."""
    streams = random_streams(small_model(layers=3), stream_config(mode="shared"))
    assert streams.shared
    base = random_streams(small_model(layers=3), stream_config())
    assert plain(streams, [1, 2, 3], 20).tokens != plain(base, [1, 2, 3], 20).tokens


@pytest.mark.parametrize(("mode", "group", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8)])
def test_the_type_is_that_of_the_layers_not_of_the_embeddings(
    mode: str, group: int, bits: int
) -> None:
    """MLX's floating modes give embeddings as bfloat16; beside float32 norms all else is float32."""
    model = tiny.tiny_model()
    nn.quantize(model, group, bits, mode=mode)
    backbone = Backbone(model)
    assert backbone.embed(mx.array([1])).dtype == mx.bfloat16
    assert backbone.embedding_rows(mx.array([1])).dtype == mx.float32  # made unit vectors of
    assert backbone.dtype == model(mx.array([[1]])).dtype == mx.float32
