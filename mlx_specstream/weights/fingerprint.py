"""Know a base model again: its sizes, and a sketch of its token embeddings.

A hash of weights would change with every cast and quantisation of the same base, and streams
trained on a float32 base run well on its 4-bit version. So the fingerprint keeps 8 x 16 sampled
embedding values, each row scaled to int8, and two fingerprints match if their sizes agree and the
sketches point the same way:

    llama:30x576:v49152:5f03e1...        kind, layers x width, vocabulary rows, 128 bytes in hex
    same base in 16, 8, 4, 3, 2 bits     cosine 1.000, 1.000, 0.990, 0.965, 0.837 (SmolLM2-135M)
    another base of the same sizes       cosine 0.00 +- 0.09; below 0.7 is another base

A fine-tune of the same base has nearly the same embeddings and is *not* told apart: streams stay
exact in lossless mode with any base (acceptance falls), and no few bytes could tell a light
fine-tune from a 2-bit original.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import ModelError
from ..machine.parts import INTO_PARTS, OUT_OF_PARTS

SKETCH_ROWS, SKETCH_COLUMNS = 8, 16
MIN_COSINE = 0.7
# What families of mlx-lm call their token embeddings.
_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embed",
    "embd",
    "embedding",
    "embeddings",
    "tok_embeddings",
    "token_embeddings",
    "word_embeddings",
    "embed_in",
)
_FORM = re.compile(
    r"([\w.\-]{1,64}):(\d{1,6})x(\d{1,8}):v(\d{1,9}):"
    rf"([0-9a-f]{{{2 * SKETCH_ROWS * SKETCH_COLUMNS}}})"
)


@dataclass(frozen=True)
class BaseDims:
    """The sizes of a base model that stream tensors depend on.

    `modules`: linear modules of the last decoder layer, name -> (inputs, outputs), as
    `self_attn.q_proj` -> (576, 576). `by_layer`: those of the layers that differ from it.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    modules: Mapping[str, tuple[int, int]]
    by_layer: Mapping[int, Mapping[str, tuple[int, int]]] = field(default_factory=dict)

    def modules_of(self, layer: int) -> Mapping[str, tuple[int, int]]:
        """Return the linear modules of one layer."""
        return self.by_layer.get(layer, self.modules)

    def common_modules(self, num_layers: int) -> tuple[str, ...]:
        """Return the names of the linear modules that the last `num_layers` layers all have."""
        last = range(self.num_layers - num_layers, self.num_layers)
        return tuple(m for m in self.modules if all(m in self.modules_of(n) for n in last))


def base_dims(model: nn.Module) -> BaseDims:
    """Read the sizes off an mlx-lm model; quantised layers count with their unquantised widths.

    Raises:
        ModelError: no decoder layers or no token embedding.
    """
    layers = getattr(model, "layers", None)
    if not layers:
        raise ModelError(
            "the model has no decoder layers; streams need a decoder-only language model of mlx-lm."
        )
    layer = layers[-1]
    modules = _linear_modules(layer)
    each = {number: _linear_modules(other) for number, other in enumerate(layers)}
    attention = getattr(layer, "self_attn", None)
    heads = getattr(
        attention,
        "n_heads",
        getattr(
            attention, "num_heads", getattr(getattr(model, "args", None), "num_attention_heads", 1)
        ),
    )
    parts = [m.group.size() for m in layer.modules() if isinstance(m, OUT_OF_PARTS)]
    width = _embedding(model)(mx.array([0])).shape[-1]
    return BaseDims(
        hidden_size=width,
        num_layers=len(layers),
        num_heads=int(heads) * (parts[0] if parts else 1),
        modules=modules,
        by_layer={number: found for number, found in each.items() if found != modules},
    )


def fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of an mlx-lm model; see the module's docstring for what it recognises.

    Cheap: it reads eight embedding rows. Stable over folders, names, casts and quantisation to 2
    bits and more.
    """
    embedding = _embedding(model)
    V = embedding.weight.shape[0]
    rows = embedding(mx.array(sketch_rows(V))).astype(mx.float32)
    kind = getattr(model, "model_type", None) or getattr(
        getattr(model, "args", None), "model_type", "model"
    )
    return make_fingerprint(str(kind), len(model.layers), V, np.array(rows))


def weights_digest(model: nn.Module) -> str:
    """Return a checksum by which a model that was changed is told from what it was.

    Cheap: it reads eight numbers of every tensor. Unlike `fingerprint` it differs for every
    fine-tune, cast and quantisation.
    """
    found: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    checksum = 0
    for name, tensor in sorted(found, key=lambda pair: pair[0]):
        start = mx.flatten(tensor[-1:] if tensor.ndim else tensor)[:8].astype(mx.float32)
        checksum = zlib.crc32(f"{name} {tensor.shape} {tensor.dtype}".encode(), checksum)
        checksum = zlib.crc32(np.array(start).tobytes(), checksum)
    return f"{checksum:08x}"


def sketch_rows(vocab_size: int) -> list[int]:
    """Return the token ids whose embedding rows are sampled: spread evenly, ends left out."""
    return [(2 * i + 1) * vocab_size // (2 * SKETCH_ROWS) for i in range(SKETCH_ROWS)]


def make_fingerprint(model_type: str, num_layers: int, vocab_size: int, rows: np.ndarray) -> str:
    """Return the fingerprint of a base with these sampled embedding rows, (8, h) float32."""
    h = rows.shape[1]
    columns = [(2 * i + 1) * h // (2 * SKETCH_COLUMNS) for i in range(SKETCH_COLUMNS)]
    values = np.nan_to_num(rows[:, columns].astype(np.float32), posinf=0.0, neginf=0.0)
    peak = np.abs(values).max(axis=1, keepdims=True)
    sketch = np.rint(127 * values / np.where(peak > 0, peak, 1)).astype(np.int8)
    return f"{model_type}:{num_layers}x{h}:v{vocab_size}:{sketch.tobytes().hex()}"


def same_base(wanted: str, found: str) -> str | None:
    """Return None if two fingerprints are of the same base, else what differs, in words."""
    first, second = _FORM.fullmatch(wanted), _FORM.fullmatch(found)
    if not first or not second:
        return None if wanted == found else "the fingerprint in the config is unreadable"
    if first[1] != second[1] or first[2] != second[2] or first[3] != second[3]:
        return (
            f"they were trained on a {first[1]} of {first[2]} layers and width {first[3]}, this is"
            f" a {second[1]} of {second[2]} layers and width {second[3]}"
        )
    if first[4] != second[4]:
        return f"they were trained with a vocabulary of {first[4]} rows, this model has {second[4]}"
    a, b = (
        np.frombuffer(bytes.fromhex(match[5]), np.int8).astype(np.float64)
        for match in (first, second)
    )
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    if norms and a @ b / norms < MIN_COSINE:
        return "the sizes agree but the token embeddings are different ones"
    return None


def embedding_name(model: nn.Module) -> str:
    """Return the path of a model's token embedding, as `model.embed_tokens`.

    Raises:
        ModelError: it has none.
    """
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
            and name.rpartition(".")[2] in _EMBEDDINGS
        ):
            return str(name)
    raise ModelError(
        "the model has no token embedding; streams need a decoder-only language model of mlx-lm."
    )


def _embedding(model: nn.Module) -> nn.Module:
    return dict(model.named_modules())[embedding_name(model)]


def _linear_modules(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the linear modules of a layer by name, sorted: (inputs, outputs).

    Those in lists (experts one by one) are left out: adapters do not reach them. One inside an
    adapter of mlx-lm counts by the adapter's name, which is the base model's own.
    """
    modules = {str(name): module for name, module in layer.named_modules()}
    found = {
        (
            outer
            if (outer := name.removesuffix(".linear")) in modules and _is_lora(modules[outer])
            else name
        ): _linear_shape(module)
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear, *INTO_PARTS, *OUT_OF_PARTS))
        and not any(part.isdecimal() for part in name.split("."))
    }
    return dict(sorted(found.items()))


def _is_lora(module: nn.Module) -> bool:
    """Tell whether a module is mlx-lm's adapter around a linear one."""
    return "lora_a" in module and "linear" in module


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return the (inputs, outputs) of a layer, whole, also where a process holds a part of it."""
    outputs, inputs = module.weight.shape
    if "scales" in module:
        inputs = inputs * 32 // module.bits
    if isinstance(module, INTO_PARTS):
        outputs *= module.group.size()
    elif isinstance(module, OUT_OF_PARTS):
        inputs *= module.group.size()
    return inputs, outputs
