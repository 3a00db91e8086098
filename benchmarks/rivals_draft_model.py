"""A draft model made of the base: some of its layers, distilled into a small model of their own.

    base     0  1  2 ...  12 ... 29 ──► norm ──► LM head
    draft    0            12     29 ──► norm ──► the same LM head

Embeddings and LM head are the base's and stay as they are; the layers kept start as the base's and
learn the base's own distribution of the next token (forward KL, as DistillSpec).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_specstream.errors import ModelError
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.train.batches import Selection
from mlx_specstream.train.drafter_loss import BaseText
from mlx_specstream.train.head import Head, cross_entropy
from mlx_specstream.train.loss import Tensors
from mlx_specstream.weights.files import atomic_folder

SHARED = ("model.embed_tokens.", "lm_head.")


def spread(num_layers: int, keep: int) -> list[int]:
    """Return `keep` layers, evenly apart, the first and the last among them."""
    return [round(i * (num_layers - 1) / (keep - 1)) for i in range(keep)]


class DraftModelObjective:
    """A model of some of the base's layers, to be differentiated.

    Raises:
        ModelError: the base's layers are not all alike and named as Llama's are.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[int]) -> None:
        base: Any = backbone.model
        self.layers = list(layers)
        arguments: Any = getattr(base, "args", None)
        if getattr(arguments, "model_type", "") != "llama":
            raise ModelError(
                f"a draft model is made of Llama's layers alone, and this is a {backbone.family} "
                "model; leave draft-model out."
            )
        sizes = {"num_hidden_layers": len(layers), "layer_types": None}
        self.model: nn.Module = type(base)(dataclasses.replace(arguments, **sizes))
        kept = [base.model.layers[number] for number in layers]
        parts = {f"model.layers.{i}": layer for i, layer in enumerate(kept)}
        parts |= {"model.norm": base.model.norm}
        shared = [(n, t) for n, t in _tensors(base) if n.startswith(SHARED)]
        self.start: Tensors = {
            f"{place}.{name}": mx.array(tensor, dtype=mx.float32)
            for place, part in parts.items()
            for name, tensor in _tensors(part)
        }
        self.model.load_weights([*shared, *self.start.items()])

    def loss(
        self, tensors: Tensors, batch: Sequence[Selection], bases: Sequence[BaseText], head: Head
    ) -> tuple[mx.array, list[mx.array]]:
        """Return the divergence () from the base's next-token distribution, and cross-entropies (R,).

        At a position t of the batch the draft model reads up to x_{t+1} and is to say x_{t+2}, as
        the others' first level is.
        """
        self.model.update(tree_unflatten(list(tensors.items())))
        states, teachers, targets = [], [], []
        for selection, base in zip(batch, bases, strict=True):
            tokens = np.array(selection.example.tokens)
            at = np.array(selection.positions, dtype=np.int64) + 1
            hidden = self.model.model(mx.array(tokens[None]))[0]
            states.append(mx.take(hidden, mx.array(at), axis=0))
            teachers.append(mx.take(base.last[0], mx.array(at), axis=0))
            targets.append(tokens[at + 1])
        wanted = np.concatenate(targets)
        weights = np.full(len(wanted), 1 / len(wanted), np.float32)
        dtype = head.backbone.dtype
        rows, teacher = (mx.concatenate(parts).astype(dtype) for parts in (states, teachers))
        total, each = cross_entropy(rows, head, wanted, weights, teacher, soft=1.0)
        return total, [each]

    def save(self, folder: Path, tensors: Tensors, base: Path) -> None:
        """Write a model folder that mlx-lm loads; config and tokenizer are those of the folder `base`.

        Raises:
            OutputError: the folder exists or cannot be written.
        """
        self.model.update(tree_unflatten(list(tensors.items())))
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        config |= {"num_hidden_layers": len(self.layers), "tie_word_embeddings": self.tied}
        for gone in ("quantization", "quantization_config", "layer_types"):
            config.pop(gone, None)
        with atomic_folder(folder, if_exists="error") as new:
            (new / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
            for file in base.iterdir():
                if file.is_file() and file.name.startswith(
                    ("tokenizer", "special", "vocab", "merg")
                ):
                    shutil.copy(file, new / file.name)
            weights = dict(_tensors(self.model))
            mx.save_safetensors(str(new / "model.safetensors"), weights, {"format": "mlx"})

    @property
    def tied(self) -> bool:
        """Tell whether the LM head is the embedding table."""
        return bool(self.model.args.tie_word_embeddings)


def _tensors(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Return a module's parameters by name."""
    return cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
