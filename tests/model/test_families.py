"""Families of mlx-lm through the engine, each against mlx-lm's own decoding.

`specstream families` tries every family of the installed mlx-lm; here are those that differ from
llama in a way of their own.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_specstream.errors import ModelError
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.families import may_be_decoded
from mlx_specstream.model.probe import check_backbone
from tests.support.against_mlx_lm import compare_with_mlx_lm
from tests.support.tiny_models import VARIANTS, WINDOW, tiny_random_model

PROMPT = [3, 7, 1, 9, 4, 2, 8]

# What a family has that llama has not.
EVERY_RUN = {
    "phi3": "fused qkv and gate-up, partial RoPE",
    "gemma2": "soft-caps, scaled embeddings, masks as arrays",
    "gemma3_text": "embeddings scaled in place, sliding windows",
    "gemma4_text": "layers of different widths that return several things",
    "gpt_oss": "attention sinks, experts, sliding windows",
    "granite": "multipliers everywhere",
    "ministral3": "a scale by position, handed to every layer",
    "deepseek_v3": "latent attention",
    "nemotron-nas": "layers without attention",
}
SLOW = ["cohere2", "exaone4", "gemma3", "glm4", "muse_glimmer", "olmo2", "olmo3", "phi", "smollm3"]


def check(name: str, **options: Any) -> None:
    tried = compare_with_mlx_lm(tiny_random_model(name), PROMPT, 5 * WINDOW, **options)
    assert tried.differs is None
    assert tried.accepted > 0


@pytest.mark.parametrize("name", EVERY_RUN)
def test_decodes_as_mlx_lm(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SLOW, *EVERY_RUN])
@pytest.mark.parametrize("seed", [1, 2])
def test_decodes_as_mlx_lm_with_other_streams(name: str, seed: int) -> None:
    check(name, seed=seed)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere2", "phi", "minicpm"])
def test_logits_from_head_rows(name: str) -> None:
    """With soft-caps, scales before and behind the head, and biases."""
    backbone = Backbone(tiny_random_model(name))
    normed = 30 * mx.random.normal((1, 4, backbone.hidden_size), key=mx.random.key(0))
    tokens = mx.array([0, 5, 11])
    few = backbone.from_rows(normed @ backbone.head_rows(tokens).T, tokens)
    expected = np.array(backbone.head(normed)[..., tokens])
    np.testing.assert_allclose(np.array(few), expected, atol=2e-4, rtol=1e-4)
    assert np.abs(expected).max() > 1


def test_scales_behind_the_head_are_in_its_rows() -> None:
    assert Backbone(tiny_random_model("granite")).head_scale == pytest.approx(1 / 3)
    assert Backbone(tiny_random_model("gemma2")).head_scale == pytest.approx(1)


def test_windows_are_found() -> None:
    assert Backbone(tiny_random_model("olmo3")).windows == [WINDOW, None, WINDOW, None]
    assert Backbone(tiny_random_model("phi3")).windows == [None] * 4


def test_scales_by_position_in_a_batch() -> None:
    backbone = Backbone(tiny_random_model("ministral3"))
    positions = mx.array([[3, 40, 9], [100, 0, 17]], dtype=mx.int32)
    together = next(iter(backbone.embed_and_head.extras(3, positions).values()))
    assert together.shape == (2, 1, 3, 1)
    for b, row in np.ndindex(2, 3):
        alone = backbone.embed_and_head.extras(1, int(positions[b, row].item()))
        assert together[b, 0, row, 0].item() == pytest.approx(next(iter(alone.values())).item())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "no attention layers"),
        ("gpt2", "learned position embeddings"),
        ("nanochat", "one position for all rows"),
        ("iquestloopcoder", "once each and in order"),
        ("deepseek_v32", "several caches each"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_a_sentence(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        Backbone(tiny_random_model(name))
    assert f"'{name}' cannot be decoded by mlx-specstream" in str(caught.value)
    assert "\n" not in str(caught.value)


PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 12}


@pytest.mark.parametrize("name", ["gemma4", "gemma4_text"])
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"num_kv_shared_layers": 2}, "the keys and values of lower ones"),
        (PER_LAYER, "inputs of their own"),
        ({**PER_LAYER, "num_kv_shared_layers": 2}, "inputs of their own"),
    ],
)
def test_gemma4_of_e2b_and_e4b_is_refused(name: str, sizes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        Backbone(tiny_random_model(name, **sizes))


@pytest.mark.parametrize("models", ["26B-A4B", "31B"])
def test_gemma4_of_other_sizes_decodes_as_mlx_lm(models: str) -> None:
    model = tiny_random_model("gemma4_text", **VARIANTS["gemma4_text"][models])
    tried = compare_with_mlx_lm(model, PROMPT, 5 * WINDOW)
    assert tried.differs is None


def test_a_mask_wider_than_its_cache_is_refused() -> None:
    """mlx-lm's plamo3: a token sees a row more in a prompt than when it is decoded."""
    with pytest.raises(ModelError, match="show a token 6 rows where its cache holds 5"):
        Backbone(tiny_random_model("plamo3"))


def test_layers_that_cannot_take_rows_are_refused_in_a_sentence() -> None:
    model = tiny_random_model("llama")

    class Picky(type(model.layers[1])):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            if isinstance(getattr(cache, "offset", 0), mx.array):
                raise TypeError("an int, please.\nsecond line")
            return super().__call__(x, mask, cache)

    model.layers[1].__class__ = Picky
    with pytest.raises(ModelError, match=r"row by row \(an int, please\); use mlx-lm itself"):
        check_backbone(Backbone(model))


def test_work_between_layers_is_refused() -> None:
    model = tiny_random_model("llama")

    class Between(type(model.model)):  # type: ignore[misc]
        def __call__(self, inputs: mx.array, cache: Any = None, _: Any = None) -> mx.array:
            h = self.embed_tokens(inputs)
            for layer, c in zip(self.layers, cache or [None] * 4, strict=True):
                h = layer(h, "causal" if h.shape[1] > 1 else None, cache=c) * 1.01
            return self.norm(h)

    model.model.__class__ = Between
    with pytest.raises(ModelError, match="something between its layers"):
        Backbone(model)


def test_the_model_stays_as_it_was() -> None:
    model = tiny_random_model("gemma2")
    before = {name: type(module) for name, module in model.named_modules()}
    weights = {name: id(module) for name, module in model.named_modules()}
    backbone = Backbone(model)
    check_backbone(backbone)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {name: id(module) for name, module in model.named_modules()} == weights
    assert backbone.embed_and_head.embedding is model.model.embed_tokens
    assert isinstance(backbone.model.layers[0].self_attn.rope, nn.RoPE)


def test_names_alone() -> None:
    assert may_be_decoded("llama")
    assert may_be_decoded("mistral")  # mlx-lm's llama
    assert not may_be_decoded("mamba")
    assert not may_be_decoded("no_such_family")
    assert not may_be_decoded("../llama")
