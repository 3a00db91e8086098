"""Drafters of every kind with random weights, over any model."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from mlx_specstream.config import DrafterConfig, LayerConfig
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.speculation.drafters import Drafter
from mlx_specstream.speculation.drafters.draft_model import DraftModelDrafter
from mlx_specstream.speculation.drafters.trained import trained_drafter
from mlx_specstream.weights.drafter import drafter_shapes
from tests.support.engine import small_model

TRAINED = ("medusa", "hydra", "hydra++", "eagle", "eagle3")
KINDS = (*TRAINED, "draft model")


def drafter_config(kind: str, h: int, vocab: int, layers: int, **changes: Any) -> DrafterConfig:
    """Return a small config of a kind, every part of it in use; `hydra++` is Hydra with a layer."""
    width = 24 if kind == "eagle3" else h
    layer = LayerConfig(
        hidden_size=width,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=70.0,
        attention_bias=kind == "eagle",
    )
    own: dict[str, dict[str, Any]] = {
        "medusa": {"num_heads": 3, "num_blocks": 2, "own_head": True},
        "hydra": {"num_heads": 3, "num_blocks": 2},
        "hydra++": {
            "num_heads": 2,
            "num_blocks": 3,
            "own_head": True,
            "bias": True,
            "layer": layer,
        },
        "eagle": {"bias": True, "layer": layer},
        "eagle3": {
            "layer": layer,
            "own_head": True,
            "own_embedding": True,
            "draft_vocab_size": vocab - 3,
            "feature_layers": (0, layers // 2, layers - 1),
        },
    }
    name: Any = kind.removesuffix("++")
    return DrafterConfig(name, h, vocab, **{**own[kind], **changes})


def random_drafter_tensors(config: DrafterConfig, seed: int = 0) -> dict[str, mx.array]:
    """Return weights of a config's shapes: norms around one, all else of a size that matters."""
    shapes = drafter_shapes(config)
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    tensors = {}
    for key, (name, shape) in zip(keys, sorted(shapes.items()), strict=True):
        if name == "d2t":
            ids = mx.random.permutation(config.vocab_size, key=key)[: shape[0]]
            tensors[name] = mx.sort(ids).astype(mx.int32)
            continue
        values = mx.random.normal(shape, key=key)
        if "norm" in name:
            tensors[name] = 1 + 0.2 * values
        elif len(shape) == 1:
            tensors[name] = 0.2 * values
        else:
            tensors[name] = 1.5 * values / math.sqrt(shape[1])
    return tensors


def random_drafter(kind: str, backbone: Backbone, seed: int = 0) -> Drafter:
    """Return a drafter of a kind over a model."""
    vocab = backbone.vocab_size
    if kind == "draft model":
        draft = small_model("llama", layers=2, vocab=vocab, seed=seed + 50)
        return DraftModelDrafter(backbone, Backbone(draft))
    config = drafter_config(kind, backbone.hidden_size, vocab, backbone.num_layers)
    return trained_drafter(backbone, config, random_drafter_tensors(config, seed))
