"""The dimensions of the model in a GGUF file, and how a file that makes no sense is refused."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import CheckpointError
from .file import GGUFFile


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


def sizes_of(gguf: GGUFFile) -> Sizes:
    """Return the model's dimensions.

    Raises:
        CheckpointError: a number is missing or they do not fit together.
    """
    family = gguf.text("general.architecture")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise refused(gguf, "it has no tensor 'token_embd.weight'")
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
        raise refused(gguf, f"its sizes do not fit together: {sizes}")
    for key in ("attention.value_length", "rope.dimension_count"):
        other = gguf.integer(f"{family}.{key}", sizes.head_dim)
        if other != sizes.head_dim:
            raise refused(gguf, f"{family}.{key} is {other} where heads are {sizes.head_dim} wide")
    return sizes


def refused(gguf: GGUFFile, why: str) -> CheckpointError:
    """Return the error for a file that cannot be converted."""
    return CheckpointError(f"{gguf.path} cannot be converted: {why}.")
