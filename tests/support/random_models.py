"""Models of any shape with random weights, and streams for them: what a step costs, without a download.

Times do not depend on what the weights say. Weights are blocks of random rows, repeated, so that
eight billion of them are made in seconds.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_specstream.config import StreamConfig
from mlx_specstream.doctor.sizes import Shape
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.train.initialise import untrained

_BLOCK_ROWS = 64
GROUP_SIZE = 64
TARGETS = ("self_attn.q_proj", "self_attn.v_proj")


def random_model(shape: Shape, bits: int, seed: int = 0) -> nn.Module:
    """Return a llama of that shape: 32 bits is float32, 16 float16, fewer quantised over float16.

    On a CPU quantised layers compute in float32, which is the faster there.
    """
    from mlx_lm.models import llama

    args = llama.ModelArgs.from_dict(
        {
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "intermediate_size": shape.intermediate,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "rms_norm_eps": 1e-5,
            "vocab_size": shape.vocab,
            "tie_word_embeddings": shape.tied,
            "max_position_embeddings": 1 << 20,
        }
    )
    model: nn.Module = llama.Model(args)
    if bits < 16:
        # Lazy: what is quantised here is replaced before anything is computed.
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits)
    on_cpu = "cpu" in str(mx.default_device()).lower()
    dtype = mx.float32 if bits == 32 or (bits < 16 and on_cpu) else mx.float16
    key = mx.random.key(seed)

    def fill(path: str, old: mx.array) -> mx.array:
        return _filled(path, old, bits, dtype, key)

    model.update(cast(dict[str, Any], tree_map_with_path(fill, model.parameters())))
    mx.eval(model.parameters())
    model.eval()
    return model


def _filled(path: str, old: mx.array, bits: int, dtype: mx.Dtype, key: mx.array) -> mx.array:
    """Return what takes the place of a parameter."""
    leaf = path.rpartition(".")[2]
    if "norm" in path:
        return mx.ones(old.shape, dtype=dtype)
    rows = min(_BLOCK_ROWS, old.shape[0])
    if old.dtype == mx.uint32:
        block = mx.random.randint(0, 2**31 - 1, (rows, old.shape[1]), dtype=mx.uint32, key=key)
    else:
        inputs = old.shape[-1] * (GROUP_SIZE if leaf in ("scales", "biases") else 1)
        # Levels 0 ... 2^bits - 1, spread evenly, deviate by 2^bits / √12 from their middle.
        step = 12**0.5 / 2**bits / inputs**0.5
        if leaf == "scales":
            return mx.full(old.shape, step, dtype=dtype)
        if leaf == "biases":
            return mx.full(old.shape, -step * (2**bits - 1) / 2, dtype=dtype)
        block = (mx.random.normal((rows, *old.shape[1:]), key=key) / inputs**0.5).astype(dtype)
    repeats = [-(-old.shape[0] // rows)] + [1] * (old.ndim - 1)
    return mx.contiguous(mx.tile(block, repeats)[: old.shape[0]])


def random_streams(
    backbone: Backbone, num_streams: int, num_msa_layers: int, conditioned: bool = False
) -> Streams:
    """Return untrained streams with adapters on queries and values, as the paper has them."""
    config = StreamConfig(
        num_streams=num_streams,
        num_msa_layers=num_msa_layers,
        lora_rank=8,
        lora_alpha=16.0,
        target_modules=TARGETS,
        conditioner_rank=64 if conditioned else 0,
        conditioner_hidden=128 if conditioned else 0,
    )
    return Streams(backbone, config, untrained(backbone, config, rms=1.0, seed=0))


def filled_cache(backbone: Backbone, tokens: int, seed: int = 0) -> KVCache:
    """Return a cache that holds `tokens` rows of random keys and values, without a prefill."""
    probe = KVCache(backbone.num_layers)
    backbone.forward(mx.array([0]), probe)
    cache = KVCache(backbone.num_layers)
    key = mx.random.key(seed)
    for like, layer in zip(probe.layers, cache.layers, strict=True):
        assert like.keys is not None
        assert like.values is not None
        rows = [
            0.1 * mx.random.normal((1, a.shape[1], tokens, a.shape[3]), key=key).astype(a.dtype)
            for a in (like.keys, like.values)
        ]
        layer.write(0, rows[0], rows[1])
    cache.advance(tokens)
    mx.eval(cache.arrays)
    return cache
