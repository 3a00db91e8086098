"""What the tensors and metadata of a GGUF file mean: Hugging Face names, shapes and config.json, a row per family.

GGUF names a family's numbers `{family}.block_count` and so on, and its tensors alike for all families. Llama's query
and key rows are stored in another order (see `unpermute`); the others as Hugging Face has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .file import GGUFFile
from .gemma3 import GEMMA3_KEYS, gemma3_config
from .quants import Floats
from .rope import rope_scaling
from .sizes import Sizes, refused, sizes_of


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
    activation: str = "silu"
    norms_around: bool = False
    """What attention and the feed-forward part return is normalised, too."""
    norms_plus_one: bool = False
    """The file has the norms' weights plus one, the model adds the one itself."""
    own_keys: frozenset[str] = frozenset()
    """Keys that only this family has; `own_config` reads them."""
    own_config: Callable[[GGUFFile, Sizes], dict[str, Any]] | None = None
    """What the family's config.json has beside the usual."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True, biases_in_config=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", projection_bias=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", head_norms=True),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        head_norms=True,
        activation="gelu_pytorch_tanh",
        norms_around=True,
        norms_plus_one=True,
        own_keys=GEMMA3_KEYS,
        own_config=gemma3_config,
    ),
}
"""By `general.architecture`; Mistral files say llama. A family of the same block is a row here."""

BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
AROUND = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""A layer's norms, before its two parts or around them: names in files and in Hugging Face folders."""

_UNDERSTOOD = {
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.causal", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "expert_count", "expert_used_count", "tensor_data_layout",
}  # fmt: skip
"""Keys below `{family}.` that are read here or change nothing; any other might, so it stops the conversion."""


@dataclass(frozen=True)
class WantedTensor:
    """A tensor the model needs: where it is in the file, its name and shape in the folder."""

    source: str
    name: str
    shape: tuple[int, ...]
    permuted_heads: int = 0
    """Number of heads whose rows are to be put back in order; 0: none."""
    plus_one: bool = False
    """The file has it plus one."""


def architecture_of(gguf: GGUFFile) -> Architecture:
    """Return the family's row, after checking that the file asks for nothing that row does not do.

    Raises:
        CheckpointError: an unknown family, or a variant (experts, partial rotation, ...) that is not converted.
    """
    family = gguf.text("general.architecture")
    row = ARCHITECTURES.get(family)
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise refused(
            gguf, f"the model is of the family {family!r}; those that can be converted are {known}"
        )
    prefix = f"{family}."
    keys = (key.removeprefix(prefix) for key in gguf.metadata if key.startswith(prefix))
    unknown = sorted(key for key in keys if key not in _UNDERSTOOD | row.own_keys)
    if unknown:
        raise refused(
            gguf, f"it sets {prefix}{unknown[0]}, which this converter does not know how to keep"
        )
    if gguf.integer(f"{prefix}expert_count", 0) > 0:
        raise refused(gguf, "it is a mixture of experts, which is not converted")
    return row


def wanted_tensors(gguf: GGUFFile) -> list[WantedTensor]:
    """Return every tensor of the model in the order of its layers, each checked to be there in the right shape.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or means nothing to this family.
    """
    row, sizes = architecture_of(gguf), sizes_of(gguf)
    wanted = [*_outer(gguf, row, sizes)]
    for layer in range(sizes.layers):
        wanted.extend(_layer(gguf, row, sizes, layer))
    for tensor in wanted:
        found = gguf.tensors.get(tensor.source)
        if found is None:
            raise refused(gguf, f"it has no tensor {tensor.source!r}")
        if found.shape != tensor.shape:
            raise refused(
                gguf, f"{tensor.source!r} has the shape {found.shape}, expected {tensor.shape}"
            )
    unknown = set(gguf.tensors) - {tensor.source for tensor in wanted} - {"rope_freqs.weight"}
    if unknown:
        raise refused(gguf, f"the tensor {min(unknown)!r} has no place in this family")
    return wanted


def _outer(gguf: GGUFFile, row: Architecture, sizes: Sizes) -> Iterator[WantedTensor]:
    yield WantedTensor(
        "token_embd.weight", "model.embed_tokens.weight", (sizes.vocabulary, sizes.width)
    )
    yield _norm(row, "output_norm", "model.norm", sizes.width)
    if not _tied(gguf):
        yield WantedTensor("output.weight", "lm_head.weight", (sizes.vocabulary, sizes.width))


def _layer(gguf: GGUFFile, row: Architecture, sizes: Sizes, layer: int) -> Iterator[WantedTensor]:
    source, name = f"blk.{layer}.", f"model.layers.{layer}."
    queries, keys = sizes.heads * sizes.head_dim, sizes.key_heads * sizes.head_dim
    norms = AROUND if row.norms_around else BEFORE
    for short, long in norms.items():
        yield _norm(row, source + short, name + long, sizes.width)
    if row.head_norms:
        for letter in "qk":
            yield _norm(
                row,
                f"{source}attn_{letter}_norm",
                f"{name}self_attn.{letter}_norm",
                sizes.head_dim,
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


def _norm(row: Architecture, source: str, name: str, width: int) -> WantedTensor:
    return WantedTensor(f"{source}.weight", f"{name}.weight", (width,), plus_one=row.norms_plus_one)


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
        "hidden_act": row.activation,
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
        "rope_scaling": rope_scaling(gguf, sizes),
        "tie_word_embeddings": _tied(gguf),
        "torch_dtype": "float32",
    }
    if row.biases_in_config:
        config["attention_bias"], config["mlp_bias"] = _biases(gguf)
    if row.own_config is not None:
        config |= row.own_config(gguf, sizes)
    return config


def _tied(gguf: GGUFFile) -> bool:
    return "output.weight" not in gguf.tensors


def _biases(gguf: GGUFFile) -> tuple[bool, bool]:
    return "blk.0.attn_q.bias" in gguf.tensors, "blk.0.ffn_up.bias" in gguf.tensors


def _shortest(value: float) -> float:
    """Return the shortest decimal with the same float32 value: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))
