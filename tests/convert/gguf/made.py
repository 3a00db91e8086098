"""GGUF files made in the tests: a small writer, and tiny models in it, independent of the reader under test."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlx.utils import tree_flatten

from tests.support import tiny

F32, F16, Q8_0 = 0, 1, 8


class Typed(NamedTuple):
    """A metadata value with its GGUF type."""

    kind: int
    value: Any
    item_kind: int = 0


def u32(value: int) -> Typed:
    return Typed(4, value)


def f32(value: float) -> Typed:
    return Typed(6, value)


def flag(value: bool) -> Typed:
    return Typed(7, value)


def text(value: str) -> Typed:
    return Typed(8, value)


def texts(values: list[str]) -> Typed:
    return Typed(9, values, 8)


def i32s(values: list[int]) -> Typed:
    return Typed(9, values, 5)


class Stored(NamedTuple):
    """A tensor as it goes into the file: bytes in a format, shape slowest axis first."""

    code: int
    shape: tuple[int, ...]
    raw: bytes


def stored(array: np.ndarray) -> Stored:
    return Stored(F32, array.shape, array.astype("<f4").tobytes())


def gguf_bytes(
    metadata: Mapping[str, Typed],
    tensors: Mapping[str, Stored],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """Return a whole file."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += _string(key) + struct.pack("<I", value.kind) + _value(value)
    offset, data = 0, b""
    for name, tensor in tensors.items():
        head += _string(name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        head += struct.pack("<IQ", tensor.code, offset)
        data += tensor.raw + bytes(-len(tensor.raw) % alignment)
        offset = len(data)
    return head + bytes(-len(head) % alignment) + data


def _string(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(typed: Typed) -> bytes:
    if typed.kind == 8:
        return _string(typed.value)
    if typed.kind == 9:
        items = b"".join(_value(Typed(typed.item_kind, item)) for item in typed.value)
        return struct.pack("<IQ", typed.item_kind, len(typed.value)) + items
    layout = {0: "B", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 12: "<d"}[typed.kind]
    return struct.pack(layout, typed.value)


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GEMMA: dict[str, Any] = {
    "vocab_size": 512,
    "num_hidden_layers": 6,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 3,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
}
"""What sets a tiny Gemma 3 apart: five layers with a window to one without."""


def tiny_tensors(family: str, **overrides: Any) -> dict[str, Stored]:
    """Return the tensors of `tests.support.tiny.tiny_model` as a GGUF file of its family has them."""
    config = tiny.tiny_config(family, **overrides)
    names = GEMMA_NAMES if family == "gemma3_text" else NAMES
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for path, array in tree_flatten(tiny.tiny_model(family, **overrides).parameters()):
        stem, _, suffix = path.rpartition(".")
        layer = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            layer = f"blk.{number}."
        values = np.array(array)
        if stem == "lm_head" and family == "gemma3_text":
            continue  # files have none: it is the embedding
        if family == "llama" and names[stem] in heads:
            values = interleave(values, heads[names[stem]])
        if family == "gemma3_text" and "norm" in stem:
            values = values + 1
        tensors[f"{layer}{names[stem]}.{suffix}"] = stored(values)
    return tensors


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Put the rows that rotate together side by side, one row at a time."""
    size = len(rows) // num_heads
    order = [
        head * size + half * (size // 2) + pair
        for head in range(num_heads)
        for pair in range(size // 2)
        for half in range(2)
    ]
    return rows[order]


def tiny_metadata(family: str, **overrides: Any) -> dict[str, Typed]:
    """Return the metadata of a tiny model: byte letters (the last five left out), three merges, two special tokens."""
    config = tiny.tiny_config(family, **overrides)
    tokens = [*tiny.byte_letters()[:251], "Ġt", "he", "Ġthe", "<start>", "<end>"]
    return {
        "general.architecture": text(family),
        "general.alignment": u32(32),
        f"{family}.context_length": u32(config["max_position_embeddings"]),
        f"{family}.embedding_length": u32(config["hidden_size"]),
        f"{family}.block_count": u32(config["num_hidden_layers"]),
        f"{family}.feed_forward_length": u32(config["intermediate_size"]),
        f"{family}.attention.head_count": u32(config["num_attention_heads"]),
        f"{family}.attention.head_count_kv": u32(config["num_key_value_heads"]),
        f"{family}.attention.layer_norm_rms_epsilon": f32(config["rms_norm_eps"]),
        f"{family}.rope.freq_base": f32(config["rope_theta"]),
        f"{family}.vocab_size": u32(len(tokens)),
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text("smollm"),
        "tokenizer.ggml.tokens": texts(tokens),
        "tokenizer.ggml.token_type": i32s([1] * 254 + [3, 3]),
        "tokenizer.ggml.merges": texts(["Ġ t", "h e", "Ġt he"]),
        "tokenizer.ggml.bos_token_id": u32(254),
        "tokenizer.ggml.eos_token_id": u32(255),
        "tokenizer.ggml.add_bos_token": flag(False),
        "tokenizer.chat_template": text(
            "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
        ),
    }


def gemma_metadata(**overrides: Any) -> dict[str, Typed]:
    """Return the metadata of a tiny Gemma 3, whose tokenizer is SentencePiece's."""
    config = tiny.tiny_config("gemma3_text", **(GEMMA | overrides))
    words = tiny_metadata("gemma3", **(GEMMA | overrides))
    del (
        words["tokenizer.ggml.pre"],
        words["tokenizer.ggml.merges"],
        words["tokenizer.chat_template"],
    )
    return words | {
        "gemma3.attention.key_length": u32(config["head_dim"]),
        "gemma3.attention.value_length": u32(config["head_dim"]),
        "gemma3.attention.sliding_window": u32(config["sliding_window"]),
        **piece_metadata(),
    }


PIECES: list[tuple[str, int, float]] = [
    *((token, 3, -1000.0) for token in ("<pad>", "<eos>", "<bos>", "<unk>")),
    ("\n", 4, -1000.0),
    ("  ", 4, -1000.0),
    ("<b>", 4, -1000.0),
    *((f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)),
    ("ab", 1, -1.0),
    ("▁a", 1, -2.0),
    ("bc", 1, -3.0),
    ("aa", 1, -4.0),
    ("▁ab", 1, -5.0),
    ("abc", 1, -6.0),
    ("aaaa", 1, -7.0),
    ("cd", 1, -8.0),
    ("▁▁a", 1, -9.0),
    *((letter, 1, -20.0 - number) for number, letter in enumerate("▁abcdefgh")),
]
"""Tokens with their types and scores."""


def piece_metadata() -> dict[str, Typed]:
    """Return the tables of a tiny SentencePiece tokenizer, filled up to 512 tokens."""
    rest = [(f"<unused{number}>", 3, -1000.0) for number in range(512 - len(PIECES))]
    tokens, kinds, scores = zip(*PIECES, *rest, strict=True)
    return {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.tokens": texts(list(tokens)),
        "tokenizer.ggml.token_type": i32s(list(kinds)),
        "tokenizer.ggml.scores": Typed(9, list(scores), 6),
        "tokenizer.ggml.padding_token_id": u32(0),
        "tokenizer.ggml.eos_token_id": u32(1),
        "tokenizer.ggml.bos_token_id": u32(2),
        "tokenizer.ggml.unknown_token_id": u32(3),
        "tokenizer.ggml.add_bos_token": flag(True),
        "tokenizer.ggml.add_space_prefix": flag(False),
    }


def write_tiny_gemma(path: Path) -> Path:
    """Write a tiny Gemma 3 as a GGUF file."""
    path.write_bytes(gguf_bytes(gemma_metadata(), tiny_tensors("gemma3_text", **GEMMA)))
    return path


def write_tiny_gguf(path: Path, family: str = "llama", **overrides: Any) -> Path:
    """Write a tiny model of a family as a GGUF file."""
    path.write_bytes(
        gguf_bytes(tiny_metadata(family, **overrides), tiny_tensors(family, **overrides))
    )
    return path
