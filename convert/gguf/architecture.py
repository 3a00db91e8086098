"""What the tensors and metadata of a GGUF file mean: Hugging Face names, shapes and config.json, a row per family.

GGUF names a family's numbers `{family}.block_count` and so on, and its tensors alike for all families. Llama's query
and key rows are stored in another order (see `unpermute`); the others as Hugging Face has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_specstream.convert.gguf.file import GGUFFile
from mlx_specstream.convert.gguf.quants import Floats
from mlx_specstream.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """How one family differs from the others."""

    model_type: str
    """The name mlx-lm and Hugging Face know it by."""
    hf_class: str
    permuted: bool = False
    """Query and key rows are stored pairwise interleaved."""
    projection_bias: bool = False
    """Query, key and value projections have a bias."""
    head_norms: bool = False
    """Queries and keys are normalised per head."""
    biases_in_config: bool = False
    """The config says whether there are biases (`attention_bias`, `mlp_bias`) and the file decides."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True, biases_in_config=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", projection_bias=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", head_norms=True),
}
"""By `general.architecture`; Mistral files say llama. A family of the same block is a row here."""

_UNDERSTOOD = {
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.causal", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "expert_count", "expert_used_count", "tensor_data_layout",
}  # fmt: skip
"""Keys below `{family}.` that are read here or change nothing; any other might, so it stops the conversion."""


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a model, as its metadata and embedding give them."""

    vocabulary: int
    width: int
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    context: int


@dataclass(frozen=True)
class WantedTensor:
    """A tensor the model needs: where it is in the file, its name and shape in the folder."""

    source: str
    name: str
    shape: tuple[int, ...]
    permuted_heads: int = 0
    """Number of heads whose rows are to be put back in order; 0: none."""


def architecture_of(gguf: GGUFFile) -> Architecture:
    """Return the family's row, after checking that the file asks for nothing that row does not do.

    Raises:
        CheckpointError: an unknown family, or a variant (experts, partial rotation, ...) that is not converted.
    """
    family = gguf.text("general.architecture")
    row = ARCHITECTURES.get(family)
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise _refused(
            gguf, f"the model is of the family {family!r}; those that can be converted are {known}"
        )
    prefix = f"{family}."
    keys = (key.removeprefix(prefix) for key in gguf.metadata if key.startswith(prefix))
    unknown = sorted(key for key in keys if key not in _UNDERSTOOD)
    if unknown:
        raise _refused(
            gguf, f"it sets {prefix}{unknown[0]}, which this converter does not know how to keep"
        )
    if gguf.integer(f"{prefix}expert_count", 0) > 0:
        raise _refused(gguf, "it is a mixture of experts, which is not converted")
    return row


def sizes_of(gguf: GGUFFile) -> Sizes:
    """Return the model's dimensions.

    Raises:
        CheckpointError: a number is missing or they do not fit together.
    """
    family = gguf.text("general.architecture")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise _refused(gguf, "it has no tensor 'token_embd.weight'")
    heads = gguf.integer(f"{family}.attention.head_count")
    width = gguf.integer(f"{family}.embedding_length")
    sizes = Sizes(
        vocabulary=embedding.shape[0],
        width=width,
        layers=gguf.integer(f"{family}.block_count"),
        hidden=gguf.integer(f"{family}.feed_forward_length"),
        heads=heads,
        key_heads=gguf.integer(f"{family}.attention.head_count_kv", heads),
        head_dim=gguf.integer(f"{family}.attention.key_length", width // max(heads, 1)),
        context=gguf.integer(f"{family}.context_length"),
    )
    if min(vars(sizes).values()) < 1 or sizes.layers > len(gguf.tensors) or heads % sizes.key_heads:
        raise _refused(gguf, f"its sizes do not fit together: {sizes}")
    for key in ("attention.value_length", "rope.dimension_count"):
        other = gguf.integer(f"{family}.{key}", sizes.head_dim)
        if other != sizes.head_dim:
            raise _refused(gguf, f"{family}.{key} is {other} where heads are {sizes.head_dim} wide")
    return sizes


def wanted_tensors(gguf: GGUFFile) -> list[WantedTensor]:
    """Return every tensor of the model in the order of its layers, each checked to be there in the right shape.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or means nothing to this family.
    """
    row, sizes = architecture_of(gguf), sizes_of(gguf)
    wanted = [*_outer(gguf, sizes)]
    for layer in range(sizes.layers):
        wanted.extend(_layer(gguf, row, sizes, layer))
    for tensor in wanted:
        found = gguf.tensors.get(tensor.source)
        if found is None:
            raise _refused(gguf, f"it has no tensor {tensor.source!r}")
        if found.shape != tensor.shape:
            raise _refused(
                gguf, f"{tensor.source!r} has the shape {found.shape}, expected {tensor.shape}"
            )
    unknown = set(gguf.tensors) - {tensor.source for tensor in wanted} - {"rope_freqs.weight"}
    if unknown:
        raise _refused(gguf, f"the tensor {min(unknown)!r} has no place in this family")
    return wanted


def _outer(gguf: GGUFFile, sizes: Sizes) -> Iterator[WantedTensor]:
    yield WantedTensor(
        "token_embd.weight", "model.embed_tokens.weight", (sizes.vocabulary, sizes.width)
    )
    yield WantedTensor("output_norm.weight", "model.norm.weight", (sizes.width,))
    if not _tied(gguf):
        yield WantedTensor("output.weight", "lm_head.weight", (sizes.vocabulary, sizes.width))


def _layer(gguf: GGUFFile, row: Architecture, sizes: Sizes, layer: int) -> Iterator[WantedTensor]:
    source, name = f"blk.{layer}.", f"model.layers.{layer}."
    queries, keys = sizes.heads * sizes.head_dim, sizes.key_heads * sizes.head_dim
    yield WantedTensor(source + "attn_norm.weight", name + "input_layernorm.weight", (sizes.width,))
    yield WantedTensor(
        source + "ffn_norm.weight", name + "post_attention_layernorm.weight", (sizes.width,)
    )
    if row.head_norms:
        for short in "qk":
            yield WantedTensor(
                f"{source}attn_{short}_norm.weight",
                f"{name}self_attn.{short}_norm.weight",
                (sizes.head_dim,),
            )
    attention_bias, mlp_bias = _biases(gguf)
    permuted = {"attn_q": sizes.heads, "attn_k": sizes.key_heads} if row.permuted else {}
    for short, long, rows, columns, bias in (
        ("attn_q", "self_attn.q_proj", queries, sizes.width, row.projection_bias or attention_bias),
        ("attn_k", "self_attn.k_proj", keys, sizes.width, row.projection_bias or attention_bias),
        ("attn_v", "self_attn.v_proj", keys, sizes.width, row.projection_bias or attention_bias),
        (
            "attn_output",
            "self_attn.o_proj",
            sizes.width,
            queries,
            row.biases_in_config and attention_bias,
        ),
        ("ffn_gate", "mlp.gate_proj", sizes.hidden, sizes.width, row.biases_in_config and mlp_bias),
        ("ffn_up", "mlp.up_proj", sizes.hidden, sizes.width, row.biases_in_config and mlp_bias),
        ("ffn_down", "mlp.down_proj", sizes.width, sizes.hidden, row.biases_in_config and mlp_bias),
    ):
        heads = permuted.get(short, 0)
        yield WantedTensor(
            f"{source}{short}.weight", f"{name}{long}.weight", (rows, columns), heads
        )
        if bias:
            yield WantedTensor(f"{source}{short}.bias", f"{name}{long}.bias", (rows,), heads)


def unpermute(rows: Floats, num_heads: int) -> Floats:
    """Put the rows of a query or key projection back in the order of the two halves.

    Llama files keep the rows that rotate together side by side (0, D/2, 1, D/2 + 1, ...), Hugging Face the first halves
    of all pairs, then the second (0, 1, ..., D/2, D/2 + 1, ...), per head of D rows.

    rows: (num_heads * D, ...) float32. Returns the same shape.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def model_config(gguf: GGUFFile) -> dict[str, Any]:
    """Return the model's config.json, without the token ids.

    `rope_theta` and `rope_scaling` are written in the old place, where every mlx-lm looks for them.
    """
    family, row, sizes = gguf.text("general.architecture"), architecture_of(gguf), sizes_of(gguf)
    config: dict[str, Any] = {
        "architectures": [row.hf_class],
        "model_type": row.model_type,
        "hidden_act": "silu",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": _shortest(gguf.number(f"{family}.attention.layer_norm_rms_epsilon")),
        "rope_theta": gguf.number(f"{family}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(gguf, family, sizes),
        "tie_word_embeddings": _tied(gguf),
        "torch_dtype": "float32",
    }
    if row.biases_in_config:
        config["attention_bias"], config["mlp_bias"] = _biases(gguf)
    return config


def _tied(gguf: GGUFFile) -> bool:
    return "output.weight" not in gguf.tensors


def _biases(gguf: GGUFFile) -> tuple[bool, bool]:
    return "blk.0.attn_q.bias" in gguf.tensors, "blk.0.ffn_up.bias" in gguf.tensors


def _shortest(value: float) -> float:
    """Return the shortest decimal with the same float32 value: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(gguf: GGUFFile, family: str, sizes: Sizes) -> dict[str, Any] | None:
    kind = gguf.text(f"{family}.rope.scaling.type", "none")
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, family, sizes)
    if kind == "linear":
        factor = gguf.number(f"{family}.rope.scaling.factor")
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    if kind != "none":
        raise _refused(gguf, f"its rope scaling is of the kind {kind!r}, which is not converted")
    return None


def _llama3_scaling(gguf: GGUFFile, family: str, sizes: Sizes) -> dict[str, Any]:
    """Find the Llama 3 settings behind a table of frequency factors, and prove that they give this very table."""
    table = gguf.read("rope_freqs.weight").reshape(-1)
    factor = float(table.max())
    settings = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = gguf.number(f"{family}.rope.freq_base", 10000.0)
    rebuilt = _llama3_factors(base, sizes.head_dim, factor)
    if table.shape != rebuilt.shape or not np.allclose(table, rebuilt, rtol=1e-4):
        raise _refused(
            gguf,
            "its table of rope frequencies is not that of Llama 3, the only one that is converted",
        )
    return settings


def _llama3_factors(base: float, head_dim: int, factor: float) -> np.ndarray:
    """Return what Llama 3.1 divides each rotation frequency by: 1 for short waves, `factor` for long ones."""
    waves = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / waves - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _refused(gguf: GGUFFile, why: str) -> CheckpointError:
    return CheckpointError(f"{gguf.path} cannot be converted: {why}.")
