"""A model folder of any llama's shape with random 4-bit weights, written layer by layer.

Memory and time do not depend on what the weights say, so this stands in for a model that cannot be
downloaded. No more than one layer is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from mlx_specstream.doctor.sizes import Shape
from tests.support.tiny import EOS, byte_letters, byte_level_tokenizer

BITS, GROUP_SIZE = 4, 64


def write_random_model(folder: Path, shape: Shape, dtype: mx.Dtype = mx.float16) -> None:
    """Write config, weights and a byte tokenizer that `mlx_lm.load` reads.

    dtype: of scales, biases and norms, and so of what the layers compute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
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
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "quantization": {"group_size": GROUP_SIZE, "bits": BITS},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    vocabulary = {letter: number for number, letter in enumerate(byte_letters())}
    vocabulary = {letter: n for letter, n in vocabulary.items() if n not in (0, 252, 253, 254, 255)}
    names = ("<pad>", "<system>", "<user>", "<assistant>", "<eos>")
    vocabulary |= dict(zip(names, (0, 252, 253, 254, 255), strict=True))
    vocabulary |= {f"t{number}": number for number in range(256, shape.vocab)}
    byte_level_tokenizer(vocabulary).save_pretrained(folder)
    for number, part in enumerate(_parts(shape, dtype)):
        path = folder / f"model-{number:05d}.safetensors"
        mx.save_safetensors(str(path), part, metadata={"format": "mlx"})
        part.clear()
        mx.clear_cache()


def _parts(shape: Shape, dtype: mx.Dtype) -> Iterator[dict[str, mx.array]]:
    """Yield the weights file by file: embedding and head, then each layer."""
    h, wide = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    seeds = iter(mx.random.split(mx.random.key(0), 8 * shape.layers + 2))

    def quantised(name: str, outputs: int, inputs: int) -> dict[str, mx.array]:
        # Levels 0 ... 2^bits - 1, spread evenly, deviate by 2^bits / √12 from their middle.
        step = 12**0.5 / 2**BITS / inputs**0.5
        words, groups = inputs * BITS // 32, inputs // GROUP_SIZE
        halves = mx.random.randint(0, 1 << 16, (2, outputs, words), mx.uint32, key=next(seeds))
        return {
            f"{name}.weight": halves[0] << 16 | halves[1],
            f"{name}.scales": mx.full((outputs, groups), step, dtype),
            f"{name}.biases": mx.full((outputs, groups), -step * (2**BITS - 1) / 2, dtype),
        }

    yield quantised("model.embed_tokens", shape.vocab, h)
    if not shape.tied:
        yield quantised("lm_head", shape.vocab, h)
    yield {"model.norm.weight": mx.ones((h,), dtype)}
    for number in range(shape.layers):
        layer = f"model.layers.{number}"
        yield {
            **quantised(f"{layer}.self_attn.q_proj", queries, h),
            **quantised(f"{layer}.self_attn.k_proj", keys, h),
            **quantised(f"{layer}.self_attn.v_proj", keys, h),
            **quantised(f"{layer}.self_attn.o_proj", h, queries),
            **quantised(f"{layer}.mlp.gate_proj", wide, h),
            **quantised(f"{layer}.mlp.up_proj", wide, h),
            **quantised(f"{layer}.mlp.down_proj", h, wide),
            f"{layer}.input_layernorm.weight": mx.ones((h,), dtype),
            f"{layer}.post_attention_layernorm.weight": mx.ones((h,), dtype),
        }
