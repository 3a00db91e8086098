"""EAGLE's layer as it is published, of either generation, renamed to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DrafterConfig
from ..errors import CheckpointError, shown
from .drafter_parts import BUFFERS, Base, Read, layer_config, rows_of, size_of, unknown_tensor
from .tensors import Tensor

_NAMES_LAYERS = "eagle_aux_hidden_state_layer_ids"


def read_eagle(
    named: Mapping[str, Tensor], fields: dict[str, Any], base: Base | None, path: Path
) -> Read:
    """Read `fc` and the one layer of EAGLE-1 and -2, which has no norm at its input."""
    del base
    tensors = {}
    for name, tensor in named.items():
        if name == "embed_tokens.weight" or BUFFERS.fullmatch(name):
            continue
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
            if match[1] != "0":
                raise CheckpointError(
                    f"{path}: this EAGLE has more than one layer ({shown(name)}), which is not supported."
                )
            tensors[f"layer.{match[2]}"] = tensor
        elif name in ("fc.weight", "fc.bias"):
            tensors[name] = tensor
        else:
            raise unknown_tensor(path, name, "an EAGLE layer")
    layer = layer_config(fields, tensors, "layer", path)
    config = DrafterConfig(
        "eagle", layer.hidden_size, size_of(fields, "vocab_size", path), bias="fc.bias" in tensors,
        layer=layer,
    )  # fmt: skip
    return config, tensors


def read_eagle3(
    named: Mapping[str, Tensor], fields: dict[str, Any], base: Base | None, path: Path
) -> Read:
    """Read `fc` over three features, the layer, its norms, the head, and the draft vocabulary."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if match := re.fullmatch(r"(?:midlayer|layers\.0)\.(.+)", name):
            if not BUFFERS.fullmatch(name):
                tensors[f"layer.{match[1]}"] = tensor
        elif name in ("fc.weight", "fc.bias", "norm.weight", "d2t", "embed_tokens.weight"):
            tensors[name] = tensor
        elif name == "lm_head.weight":
            tensors["head.weight"] = tensor
        elif not BUFFERS.fullmatch(name):
            raise unknown_tensor(path, name, "EAGLE-3")
    layer = layer_config(fields, tensors, "layer", path)
    rows_of(tensors["fc.weight"], path, "fc.weight")
    features = tensors["fc.weight"].shape[-1]
    if features % 3:
        raise CheckpointError(
            f"{path}: fc takes {features} features, which are not those of three layers."
        )
    h, V = features // 3, size_of(fields, "vocab_size", path)
    own = "head.weight" in tensors
    drafted = rows_of(tensors["head.weight"], path, "lm_head.weight") if own else V
    own_embedding = layer.hidden_size != h
    if not own_embedding:
        tensors.pop("embed_tokens.weight", None)
    if drafted < V and "d2t" not in tensors:
        raise CheckpointError(
            f"{path}: the head drafts {drafted} of {V} tokens, and no d2t says which."
        )
    table = tensors.pop("d2t", None)
    if drafted != V and table is not None:
        tensors["d2t"] = _token_table(table, named.get("t2d"), path)
    config = DrafterConfig(
        "eagle3", h, V, own_head=own, bias="fc.bias" in tensors, layer=layer,
        draft_vocab_size=drafted, feature_layers=_feature_layers(fields, base, path),
        own_embedding=own_embedding,
    )  # fmt: skip
    return config, tensors


def _token_table(table: Tensor, drafted: Tensor | None, path: Path) -> Tensor:
    """Return the table of token ids that EAGLE-3's offsets mean.

    drafted: whether each of the base's tokens is in it, if the file says.

    Raises:
        CheckpointError: no offsets, or of other tokens than `drafted` says.
    """
    if table.dtype not in ("I64", "I32") or len(table.shape) != 1:
        raise CheckpointError(
            f"{path}: d2t is {table.dtype} {table.shape}, expected integers (n,)."
        )
    ids = table.offsets_to_ids()
    if drafted is not None and not np.array_equal(
        np.sort(ids.read()), np.flatnonzero(drafted.read())
    ):
        raise CheckpointError(
            f"{path.parent}: d2t and t2d name different tokens; get the file again."
        )
    return ids


def _feature_layers(fields: Mapping[str, Any], base: Base | None, path: Path) -> tuple[int, ...]:
    """Return the layers at whose input the features are taken: named, or a low, a middle, a high one."""
    settings = fields.get("eagle_config")
    named = settings.get(_NAMES_LAYERS) if isinstance(settings, dict) else None
    if named is not None:
        if not isinstance(named, list) or not all(type(number) is int for number in named):
            raise CheckpointError(f"{path}: {_NAMES_LAYERS} must be a list of layers.")
        return tuple(number + 1 for number in named)  # they name layers by their outputs
    if base is None:
        raise CheckpointError(
            f"{path} does not say which layers EAGLE-3 takes its features from: that depends on the "
            "base model; give its folder as --base."
        )
    N = base.dims.num_layers
    return (2, N // 2, N - 3)
