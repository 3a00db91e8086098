"""What the readers of published drafters share: the base, a layer's sizes, and their errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DrafterConfig, LayerConfig
from ..errors import CheckpointError, shown
from ..weights.fingerprint import BaseDims
from .configs import base_config
from .tensors import Tensor

BUFFERS = re.compile(r"(.+\.)?(rotary_emb\.inv_freq|t2d)")
_ROPES = ("default", "linear", "llama3", "yarn", "longrope")  # what mlx-lm's layers rotate by

Read = tuple[DrafterConfig, dict[str, Tensor]]


@dataclass(frozen=True)
class Base:
    """The base that a drafter is converted for: its config.json and sizes."""

    config: Mapping[str, Any]
    dims: BaseDims


def layer_config(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, path: Path
) -> LayerConfig:
    """Return the sizes of a decoder layer from a config.json of Llama's form."""
    if not fields:
        raise CheckpointError(f"{path} is missing; put the drafter's config.json there.")
    config = base_config({"model_type": "llama", **fields}, path)
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{path}: hidden_act is {shown(config['hidden_act'])}, expected 'silu'."
        )
    scaling = config.get("rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else "default"
    if kind not in _ROPES:
        raise CheckpointError(
            f"{path}: rope_scaling is of the type {shown(kind)}, expected one of {', '.join(_ROPES)}."
        )
    width, heads = (
        size_of(config, "hidden_size", path),
        size_of(config, "num_attention_heads", path),
    )
    optional = {
        key: config[key]
        for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings")
        if config.get(key) is not None
    }
    return LayerConfig(
        hidden_size=width,
        intermediate_size=size_of(config, "intermediate_size", path),
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        rope_scaling=None if kind == "default" else scaling,
        attention_bias=f"{name}.self_attn.q_proj.bias" in tensors,
        **optional,
    )


def size_of(fields: Mapping[str, Any], name: str, path: Path) -> int:
    """Return a size that a config.json names.

    Raises:
        CheckpointError: it does not.
    """
    value = fields.get(name)
    if type(value) is not int:
        raise CheckpointError(f"{path}: {name} is {shown(value)}, expected a number.")
    return value


def rows_of(tensor: Tensor | None, path: Path, name: str) -> int:
    """Return the rows of a matrix.

    Raises:
        CheckpointError: there is none; it should be called `name`.
    """
    if tensor is None or len(tensor.shape) != 2:
        raise CheckpointError(f"{path.parent} lacks the matrix {name}.")
    return tensor.shape[0]


def unknown_tensor(path: Path, name: str, what: str) -> CheckpointError:
    """Return the error of a tensor that does not belong to `what`."""
    return CheckpointError(
        f"{path.parent} holds {shown(name)}, which is no tensor of {what}; remove it, or tell us of "
        "the program that wrote it."
    )
