"""Published drafters, read: Medusa's heads, Hydra's heads, EAGLE's layer of either generation.

    found by its tensors' names                          from
    0.0.linear.weight, 0.1.weight, ...                   FasterDecoding/Medusa: medusa_lm_head.pt
    hydra_mlp.0.0.linear.weight, hydra_lm_head.0.weight  zankner/Hydra: hydra_lm_head.pt
    fc.weight, layers.0.self_attn.q_proj.weight          SafeAILab/EAGLE (1 and 2): pytorch_model.bin
    fc.weight, midlayer.hidden_norm.weight, d2t          EAGLE-3, and SpecForge's

Copies of the base's token embeddings, which all of them train frozen, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DrafterConfig, LayerConfig
from ..errors import CheckpointError, StreamsError, brief, shown
from ..weights.drafter import drafter_shapes
from ..weights.fingerprint import BaseDims
from ..weights.tensorfile import difference
from .base import DTYPES
from .configs import base_config
from .names import unwrapped
from .reader import CONFIG, Checkpoint
from .tensors import Tensor

_MEDUSA = re.compile(r"(?P<prefix>(?:medusa_)?heads?\.)?(?P<head>\d+)\.(?P<at>\d+)\.(?P<rest>.+)")
_HYDRA_MLP = re.compile(r"hydra_mlp\.(\d+)\.(\d+)\.(linear|res_connection)\.(weight|bias)")
_HYDRA_HEAD = re.compile(r"hydra_lm_head\.(\d+)\.(?:\d+\.)?(weight|bias)")
_BUFFERS = re.compile(r"(.+\.)?(rotary_emb\.inv_freq|t2d)")
_ROPES = ("default", "linear", "llama3", "yarn", "longrope")  # what mlx-lm's layers rotate by
_NAMES_LAYERS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class DrafterPlan:
    """What will be written of a drafter."""

    config: DrafterConfig
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Base:
    """The base that a drafter is converted for: its config.json and sizes."""

    config: Mapping[str, Any]
    dims: BaseDims


def drafter_kind(checkpoint: Checkpoint) -> str | None:
    """Return the kind of drafter that a checkpoint is by its tensors' names; None if it is none."""
    names = {unwrapped(name) for name in checkpoint.tensors}
    if any(_HYDRA_MLP.fullmatch(name.removeprefix("hydra_head.")) for name in names):
        return "hydra"
    if "fc.weight" in names:
        if names & {"midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight"}:
            return "eagle3"
        if "layers.0.self_attn.q_proj.weight" in names:
            return "eagle"
    if any((m := _MEDUSA.fullmatch(name)) and m["rest"] == "linear.weight" for name in names):
        return "medusa"
    return None


def plan_drafter(
    kind: str, checkpoint: Checkpoint, base: Base | None, dtype: str | None
) -> DrafterPlan:
    """Plan the tensors of a published drafter, renamed and checked.

    base: what it was trained for, if that is at hand. dtype: float16, bfloat16 or float32; None for
    each tensor's own.

    Raises:
        CheckpointError: a tensor is unknown, missing, misshapen or not of floats, or the config does
            not say what is needed.
        StreamsError: the drafter's sizes make no sense.
    """
    path = checkpoint.folder / CONFIG
    named: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        plain = unwrapped(name)
        if plain in named:
            raise CheckpointError(
                f"two tensors of {checkpoint.path} mean {shown(plain)}; remove one."
            )
        named[plain] = tensor
    fields = dict(checkpoint.config or {})
    try:
        config, renamed = _READERS[kind](named, fields, base, path)
    except StreamsError as error:
        raise CheckpointError(f"{checkpoint.path}: {brief(error, 500)}.") from None
    found = {name: tensor.shape for name, tensor in renamed.items()}
    called = {name: tensor.sources[0][1] for name, tensor in renamed.items()}
    if odd := difference(found, drafter_shapes(config), called):
        raise CheckpointError(f"{checkpoint.path}: {odd}; check that config.json belongs to it.")
    if base is not None and base.dims.hidden_size != config.hidden_size:
        raise CheckpointError(
            f"{checkpoint.path} is a drafter for a model of width {config.hidden_size}, and the base "
            f"has {base.dims.hidden_size}; give the base it was trained on."
        )
    tensors = []
    for name, tensor in sorted(renamed.items()):
        tensor = tensor.renamed(name)
        if name != "d2t":
            if not tensor.is_float:
                raise CheckpointError(
                    f"{checkpoint.path}: {name} is {tensor.dtype}, expected floats."
                )
            tensor = tensor.cast(DTYPES[dtype]) if dtype else tensor
        tensors.append(tensor)
    return DrafterPlan(config, tuple(tensors))


Read = tuple[DrafterConfig, dict[str, Tensor]]


def _medusa(
    named: Mapping[str, Tensor], fields: dict[str, Any], base: Base | None, path: Path
) -> Read:
    """Read heads of the form `{head}.{block}.linear.*`, then `{head}.{blocks}.weight`."""
    del base
    matches = {name: match for name in named if (match := _MEDUSA.fullmatch(name))}
    # Heads that were saved with their base have a prefix, and the rest is the base's.
    whole_model = all(match["prefix"] for match in matches.values())
    tensors: dict[str, Tensor] = {}
    blocks: dict[int, int] = {}
    for name, tensor in named.items():
        match = matches.get(name)
        if match is None:
            if whole_model or _BUFFERS.fullmatch(name):
                continue
            raise _unknown(path, name, "Medusa heads")
        head, at, rest = int(match["head"]), int(match["at"]), match["rest"]
        if rest in ("linear.weight", "linear.bias"):
            tensors[f"heads.{head}.blocks.{at}.{rest.partition('.')[2]}"] = tensor
            blocks[head] = max(blocks.get(head, 0), at + 1)
        elif rest == "weight":
            tensors[f"heads.{head}.head.weight"] = tensor
        else:
            raise _unknown(path, name, "Medusa heads")
    block = tensors.get("heads.0.blocks.0.weight")
    width = _rows(block, path, "0.0.linear.weight")
    own = "heads.0.head.weight" in tensors
    vocabulary = (
        tensors["heads.0.head.weight"].shape[0] if own else _size(fields, "vocab_size", path)
    )
    config = DrafterConfig(
        "medusa", width, vocabulary, num_heads=max(blocks) + 1, num_blocks=max(blocks.values()),
        own_head=own,
    )  # fmt: skip
    return config, tensors


def _hydra(
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
        if match := _HYDRA_MLP.fullmatch(name):
            at = places.setdefault(int(match[1]), [])
            if int(match[2]) not in at:
                at.append(int(match[2]))
    for name, tensor in names.items():
        prefix = name.removeprefix("prefix_embeding_layer.")
        if match := _HYDRA_MLP.fullmatch(name):
            head, part = int(match[1]), match[4]
            block = sorted(places[head]).index(int(match[2]))
            if match[3] == "linear":
                tensors[f"heads.{head}.blocks.{block}.{part}"] = tensor
            elif block == 0:
                tensors[f"heads.{head}.residual.{part}"] = tensor
            else:
                raise _unknown(path, name, "Hydra heads")
        elif match := _HYDRA_HEAD.fullmatch(name):
            tensors[f"heads.{int(match[1])}.head.{match[2]}"] = tensor
        elif prefix != name and prefix.startswith("layers.0."):
            if not _BUFFERS.fullmatch(prefix):
                tensors[prefix.replace("layers.0.", "prefix.", 1)] = tensor
        elif prefix != name and prefix == "norm.weight":
            tensors["norm.weight"] = tensor
        elif prefix != "embed_tokens.weight" and not _BUFFERS.fullmatch(prefix):
            raise _unknown(path, name, "Hydra heads")
    width = _rows(
        tensors.get("heads.0.residual.weight"), path, "hydra_mlp.0.0.res_connection.weight"
    )
    own = "heads.0.head.weight" in tensors
    vocabulary = (
        tensors["heads.0.head.weight"].shape[0] if own else _size(fields, "vocab_size", path)
    )
    layer = None
    if "norm.weight" in tensors:
        if base is None:
            raise CheckpointError(
                f"{path} does not say how many attention heads Hydra++'s layer has: they are the "
                "base model's; give its folder as --base."
            )
        layer = _layer(base.config, tensors, "prefix", path)
    config = DrafterConfig(
        "hydra", width, vocabulary, num_heads=max(places) + 1,
        num_blocks=max(len(at) for at in places.values()), own_head=own,
        bias="heads.0.head.bias" in tensors, layer=layer,
    )  # fmt: skip
    return config, tensors


def _eagle(
    named: Mapping[str, Tensor], fields: dict[str, Any], base: Base | None, path: Path
) -> Read:
    """Read `fc` and the one layer of EAGLE-1 and -2, which has no norm at its input."""
    del base
    tensors = {}
    for name, tensor in named.items():
        if name == "embed_tokens.weight" or _BUFFERS.fullmatch(name):
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
            raise _unknown(path, name, "an EAGLE layer")
    layer = _layer(fields, tensors, "layer", path)
    config = DrafterConfig(
        "eagle", layer.hidden_size, _size(fields, "vocab_size", path), bias="fc.bias" in tensors,
        layer=layer,
    )  # fmt: skip
    return config, tensors


def _eagle3(
    named: Mapping[str, Tensor], fields: dict[str, Any], base: Base | None, path: Path
) -> Read:
    """Read `fc` over three features, the layer, its norms, the head, and the draft vocabulary."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if match := re.fullmatch(r"(?:midlayer|layers\.0)\.(.+)", name):
            if not _BUFFERS.fullmatch(name):
                tensors[f"layer.{match[1]}"] = tensor
        elif name in ("fc.weight", "fc.bias", "norm.weight", "d2t", "embed_tokens.weight"):
            tensors[name] = tensor
        elif name == "lm_head.weight":
            tensors["head.weight"] = tensor
        elif not _BUFFERS.fullmatch(name):
            raise _unknown(path, name, "EAGLE-3")
    layer = _layer(fields, tensors, "layer", path)
    features = tensors["fc.weight"].shape[-1]
    if features % 3:
        raise CheckpointError(
            f"{path}: fc takes {features} features, which are not those of three layers."
        )
    h, V = features // 3, _size(fields, "vocab_size", path)
    own = "head.weight" in tensors
    drafted = tensors["head.weight"].shape[0] if own else V
    own_embedding = layer.hidden_size != h
    if not own_embedding:
        tensors.pop("embed_tokens.weight", None)
    if drafted < V and "d2t" not in tensors:
        raise CheckpointError(
            f"{path}: the head drafts {drafted} of {V} tokens, and no d2t says which."
        )
    if drafted == V:
        tensors.pop("d2t", None)
    elif tensors["d2t"].dtype not in ("I64", "I32"):
        raise CheckpointError(f"{path}: d2t is {tensors['d2t'].dtype}, expected integers.")
    else:
        tensors["d2t"] = tensors["d2t"].offsets_to_ids()
    config = DrafterConfig(
        "eagle3", h, V, own_head=own, bias="fc.bias" in tensors, layer=layer,
        draft_vocab_size=drafted, feature_layers=_feature_layers(fields, base, path),
        own_embedding=own_embedding,
    )  # fmt: skip
    return config, tensors


_READERS: dict[str, Callable[[Mapping[str, Tensor], dict[str, Any], Base | None, Path], Read]] = {
    "medusa": _medusa,
    "hydra": _hydra,
    "eagle": _eagle,
    "eagle3": _eagle3,
}


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


def _layer(
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
    width, heads = _size(config, "hidden_size", path), _size(config, "num_attention_heads", path)
    optional = {
        key: config[key]
        for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings")
        if config.get(key) is not None
    }
    return LayerConfig(
        hidden_size=width,
        intermediate_size=_size(config, "intermediate_size", path),
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        rope_scaling=None if kind == "default" else scaling,
        attention_bias=f"{name}.self_attn.q_proj.bias" in tensors,
        **optional,
    )


def _size(fields: Mapping[str, Any], name: str, path: Path) -> int:
    value = fields.get(name)
    if type(value) is not int:
        raise CheckpointError(f"{path}: {name} is {shown(value)}, expected a number.")
    return value


def _rows(tensor: Tensor | None, path: Path, name: str) -> int:
    if tensor is None or len(tensor.shape) != 2:
        raise CheckpointError(f"{path.parent} lacks the matrix {name}.")
    return tensor.shape[0]


def _unknown(path: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path.parent} holds {shown(name)}, which is no tensor of {what}; remove it, or tell us of "
        "the program that wrote it."
    )
