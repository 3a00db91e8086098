"""Heads as they are published: Medusa's and Hydra's, renamed to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import DrafterConfig
from ..errors import CheckpointError
from .drafter_parts import BUFFERS, Base, Read, layer_config, rows_of, size_of, unknown_tensor
from .tensors import Tensor

MEDUSA = re.compile(r"(?P<prefix>(?:medusa_)?heads?\.)?(?P<head>\d+)\.(?P<at>\d+)\.(?P<rest>.+)")
HYDRA_MLP = re.compile(r"hydra_mlp\.(\d+)\.(\d+)\.(linear|res_connection)\.(weight|bias)")
_HYDRA_HEAD = re.compile(r"hydra_lm_head\.(\d+)\.(?:\d+\.)?(weight|bias)")


def read_medusa(
    named: Mapping[str, Tensor], fields: dict[str, Any], base: Base | None, path: Path
) -> Read:
    """Read heads of the form `{head}.{block}.linear.*`, then `{head}.{blocks}.weight`."""
    del base
    matches = {name: match for name in named if (match := MEDUSA.fullmatch(name))}
    # Heads that were saved with their base have a prefix, and the rest is the base's.
    whole_model = all(match["prefix"] for match in matches.values())
    tensors: dict[str, Tensor] = {}
    blocks: dict[int, int] = {}
    for name, tensor in named.items():
        match = matches.get(name)
        if match is None:
            if whole_model or BUFFERS.fullmatch(name):
                continue
            raise unknown_tensor(path, name, "Medusa heads")
        head, at, rest = int(match["head"]), int(match["at"]), match["rest"]
        if rest in ("linear.weight", "linear.bias"):
            tensors[f"heads.{head}.blocks.{at}.{rest.partition('.')[2]}"] = tensor
            blocks[head] = max(blocks.get(head, 0), at + 1)
        elif rest == "weight":
            tensors[f"heads.{head}.head.weight"] = tensor
        else:
            raise unknown_tensor(path, name, "Medusa heads")
    block = tensors.get("heads.0.blocks.0.weight")
    width = rows_of(block, path, "0.0.linear.weight")
    own = "heads.0.head.weight" in tensors
    vocabulary = _vocabulary(tensors, fields, path)
    config = DrafterConfig(
        "medusa", width, vocabulary, num_heads=max(blocks) + 1, num_blocks=max(blocks.values()),
        own_head=own,
    )  # fmt: skip
    return config, tensors


def read_hydra(
    named: Mapping[str, Tensor], fields: dict[str, Any], base: Base | None, path: Path
) -> Read:
    """Read heads of the form `hydra_mlp.{head}.{place}.*`, which leaves places to dropout."""
    if fields.get("grounded_heads") is False:
        raise CheckpointError(
            f"{path}: these Hydra heads do not know the tokens before (grounded_heads false), which is "
            "not supported; convert heads that do, or Medusa's."
        )
    tensors: dict[str, Tensor] = {}
    places: dict[int, list[int]] = {}
    names = {name.removeprefix("hydra_head."): tensor for name, tensor in named.items()}
    for name in names:
        if match := HYDRA_MLP.fullmatch(name):
            at = places.setdefault(int(match[1]), [])
            if int(match[2]) not in at:
                at.append(int(match[2]))
    for name, tensor in names.items():
        prefix = name.removeprefix("prefix_embeding_layer.")
        if match := HYDRA_MLP.fullmatch(name):
            head, part = int(match[1]), match[4]
            block = sorted(places[head]).index(int(match[2]))
            if match[3] == "linear":
                tensors[f"heads.{head}.blocks.{block}.{part}"] = tensor
            elif block == 0:
                tensors[f"heads.{head}.residual.{part}"] = tensor
            else:
                raise unknown_tensor(path, name, "Hydra heads")
        elif match := _HYDRA_HEAD.fullmatch(name):
            tensors[f"heads.{int(match[1])}.head.{match[2]}"] = tensor
        elif prefix != name and prefix.startswith("layers.0."):
            if not BUFFERS.fullmatch(prefix):
                tensors[prefix.replace("layers.0.", "prefix.", 1)] = tensor
        elif prefix != name and prefix == "norm.weight":
            tensors["norm.weight"] = tensor
        elif prefix != "embed_tokens.weight" and not BUFFERS.fullmatch(prefix):
            raise unknown_tensor(path, name, "Hydra heads")
    width = rows_of(
        tensors.get("heads.0.residual.weight"), path, "hydra_mlp.0.0.res_connection.weight"
    )
    own = "heads.0.head.weight" in tensors
    vocabulary = _vocabulary(tensors, fields, path)
    layer = None
    if "norm.weight" in tensors:
        if base is None:
            raise CheckpointError(
                f"{path} does not say how many attention heads Hydra++'s layer has: they are the "
                "base model's; give its folder as --base."
            )
        layer = layer_config(base.config, tensors, "prefix", path)
    config = DrafterConfig(
        "hydra", width, vocabulary, num_heads=max(places) + 1,
        num_blocks=max(len(at) for at in places.values()), own_head=own,
        bias="heads.0.head.bias" in tensors, layer=layer,
    )  # fmt: skip
    return config, tensors


def _vocabulary(tensors: Mapping[str, Tensor], fields: dict[str, Any], path: Path) -> int:
    """Return the tokens that heads predict: the rows of their own, else what the config says."""
    head = tensors.get("heads.0.head.weight")
    if head is None:
        return size_of(fields, "vocab_size", path)
    return rows_of(head, path, head.sources[0][1])
