"""Dividing a model among the processes that `mlx.launch` has started: each layer, or by layers.

*Sharded*, every process holds a part of every layer's heads and channels (`shard` of mlx-lm's
model), and a pass costs two messages per layer. In a *pipeline* every process holds some of the
layers (`model/stages.py`), which works for every family without states, costs one message per
process, and computes bit for bit what one process would.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ModelError, brief
from ..machine import ranks
from ..model.backbone import Backbone
from ..model.stages import Stages
from ..speculation.randomness import seeded
from ..weights.files import sketch

# What decides the tokens and what they mean.
_SAME = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
)
_HEADS = ("num_attention_heads", "num_key_value_heads")


def divided(model: nn.Module, *, pipeline: bool = False) -> Backbone:
    """Return the view of `model` that computes this process's part of it, or all if there is one.

    The layers are sharded where mlx-lm can and the heads can be divided, unless `pipeline`.

    Raises:
        ModelError: the family is not supported, or the model cannot be divided.
    """
    group = ranks.group()
    if group is None:
        return Backbone(model)
    if not pipeline and _shards(model, group.size()):
        _shard(model)
        return Backbone(model)
    backbone = Backbone(model)
    _check_stages(backbone)
    backbone.stages = Stages.even(backbone.num_layers, group)
    return backbone


def refuse_undivided(adapter_path: str | None, draft_model: str | Path | None) -> None:
    """Refuse what several processes cannot load.

    Raises:
        ModelError: adapters of mlx-lm, or a drafter that is not streams.
    """
    if adapter_path is not None:
        raise ModelError(
            "adapters of mlx-lm cannot be divided among several processes; merge them into the "
            "model first, with mlx_lm.fuse."
        )
    if draft_model is not None:
        raise ModelError(
            "several processes draft with streams or look-up alone; leave the draft model out."
        )


def check_same_model(folder: Path) -> None:
    """Make sure that all processes load the same model and tokenizer.

    Raises:
        ModelError: files differ.
    """
    ranks.check_same(
        lambda: sketch(folder, _SAME),
        "{odd} has other files of this model than process 0; copy the model's folder from one "
        "machine to all the others.",
    )


def own_arrays(backbone: Backbone) -> list[mx.array]:
    """Return the weights this process computes with; those of other layers are never read."""
    elsewhere = set(range(backbone.num_layers)) - set(backbone.stages.own)
    others = {id(array) for index in elsewhere for array in _arrays(backbone.layers[index])}
    return [array for array in _arrays(backbone.model) if id(array) not in others]


def _arrays(module: nn.Module) -> list[mx.array]:
    """Return all that a module holds: also what is no parameter, as a table of rotations is not."""
    named = cast(list[tuple[str, object]], tree_flatten(module))
    return [array for _, array in named if isinstance(array, mx.array)]


def _shards(model: nn.Module, processes: int) -> bool:
    """Tell whether mlx-lm can divide every layer of `model` among so many processes."""
    if not callable(getattr(model, "shard", None)):
        return False
    arguments = getattr(model, "args", None)
    inner = getattr(arguments, "text_config", None)
    sizes = inner if isinstance(inner, dict) else vars(arguments) if arguments else {}
    heads = [sizes.get(name) for name in _HEADS]
    return all(isinstance(number, int) and number % processes == 0 for number in heads)


def _shard(model: nn.Module) -> None:
    """Keep this process's part of every layer.

    Raises:
        ModelError: a size cannot be divided.
    """
    try:
        with seeded(0, 0):  # the new layers' first weights are drawn, and thrown away
            model.shard(ranks.group())
    except ValueError as error:
        raise ModelError(
            f"the layers of this model cannot be divided among {ranks.count()} processes: "
            f"{brief(error)}; give each process whole layers with --pipeline."
        ) from error


def _check_stages(backbone: Backbone) -> None:
    """Refuse what cannot be divided by layers.

    Raises:
        ModelError: the model has states, or fewer layers than there are processes.
    """
    if backbone.is_recurrent:
        raise ModelError(
            f"a {backbone.family} model cannot be divided by layers among processes: some of its "
            "layers keep a state; run it in one process."
        )
    if backbone.num_layers < ranks.count():
        raise ModelError(
            f"a model of {backbone.num_layers} layers cannot be divided among {ranks.count()} "
            "processes; start fewer."
        )
