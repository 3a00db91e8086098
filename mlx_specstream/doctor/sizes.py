"""How large models are before they are downloaded, and which of them a machine's memory holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..machine import Machine
from ..model.families import may_be_decoded
from ..weights.hub import fetch

CONTEXT = 8192
"""Tokens of context that a model is given room for."""

HEADROOM = 1_000_000_000
"""Bytes for activations, logits, streams and the program itself."""

SCALES_BITS = 0.5
"""Bits per weight that scales and biases of a quantised layer add, in groups of 64."""


@dataclass(frozen=True)
class Shape:
    """What decides a decoder's size. bits: of its weights as stored, 0 if not known."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    family: str = "llama"
    bits: int = 0

    @property
    def num_params(self) -> int:
        """Return the number of weights, without norms and biases."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied else 2)

    def weight_bytes(self, bits: int) -> int:
        """Return the size of the weights in `bits` bits; below 16 they are quantised."""
        each = bits if bits >= 16 else bits + SCALES_BITS
        return int(self.num_params * each / 8)

    def cache_bytes(self, tokens: int) -> int:
        """Return the size of the KV cache of that many tokens, in 16 bits."""
        return tokens * 2 * self.layers * self.kv_heads * self.head_dim * 2

    def needed_bytes(self, bits: int, tokens: int = CONTEXT) -> int:
        """Return the memory that decoding takes."""
        return self.weight_bytes(bits) + self.cache_bytes(tokens) + HEADROOM


TYPICAL = (
    Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152, True),
    Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, True),
    Shape("Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128, 128256, True),
    Shape("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151936, True, "qwen3"),
    Shape("Mistral-7B", 32, 4096, 14336, 32, 8, 128, 32768),
    Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Shape("Qwen3-14B", 40, 5120, 17408, 40, 8, 128, 151936, False, "qwen3"),
    Shape("Qwen3-32B", 64, 5120, 25600, 64, 8, 128, 151936, False, "qwen3"),
    Shape("Llama-3.3-70B", 80, 8192, 28672, 64, 8, 128, 128256),
)


def usable_bytes(machine: Machine) -> int:
    """Return how much memory a model may take, 0 if the machine does not say.

    On a Mac what Metal recommends; where it does not say, two thirds of up to 32 GB and three
    quarters of more, as Metal does. On CUDA the GPU's memory, elsewhere nine tenths of all.
    """
    if machine.working_set_bytes:
        return machine.working_set_bytes
    if machine.system == "Darwin":
        share = 2 / 3 if machine.memory_bytes <= 36e9 else 3 / 4
        return int(machine.memory_bytes * share)
    return int(machine.memory_bytes * 0.9)


def read_shape(name: str) -> Shape:
    """Read a model's size from its config.json: of a folder here, or fetched from the hub alone.

    Raises:
        ModelError: there is none, it cannot be reached, or it is no decoder of the usual kind.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = fetch(name, "model", ModelError, patterns=("config.json",))
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(f"{name} holds no config.json, so it is no model folder.") from None
    except (ValueError, RecursionError):
        raise ModelError(f"the config.json of {name} is not valid JSON; fetch it again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"the config.json of {name} is no model's; fetch it again.")
    return shape_of(Path(name).name, values)


def shape_of(name: str, config: Mapping[str, object]) -> Shape:
    """Return the size that a config.json describes.

    Raises:
        ModelError: a field is missing or no positive integer.
    """
    inner = config.get("text_config")
    values = {**config, **inner} if isinstance(inner, dict) else dict(config)

    def number(key: str, otherwise: int = 0) -> int:
        value = values.get(key)
        if value is None and otherwise:
            return otherwise
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(
                f"the config.json of {name} says {key} = {value!r} where a positive number is "
                "expected; it is no decoder whose size can be told."
            )
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    quantised = values.get("quantization") or values.get("quantization_config")
    bits = quantised.get("bits") if isinstance(quantised, dict) else None
    if not isinstance(bits, int):
        dtype = str(values.get("torch_dtype") or values.get("dtype") or "")
        bits = 32 if dtype.endswith("float32") else 16 if dtype.endswith("16") else 0
    return Shape(
        name=name,
        layers=number("num_hidden_layers"),
        hidden=hidden,
        intermediate=number("intermediate_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", max(1, hidden // heads)),
        vocab=number("vocab_size"),
        tied=bool(values.get("tie_word_embeddings", False)),
        family=str(values.get("model_type", "")),
        bits=bits,
    )


def supported(shape: Shape) -> bool:
    """Tell whether models of this family can be decoded with streams, as far as its name tells."""
    return may_be_decoded(shape.family)
