"""What the frozen base model computes for a training text, kept on disk.

In lossless mode main rows never depend on the streams, so the base model's part of a training step is the same in every
epoch: the residual M where the streams start and the main stream's keys and values in the MSA layers [own, method §4].
`distill.py` has them in its buffers anyway. Two files, both only ever appended to:

    states.bin     one record after another: keys, values (N_s, K, L, D each), hidden (A, h), 16 bit
    states.jsonl   one line of shapes, then {"source", "index", "offset", "length", "answer"} a record

with L = prompt + A - 1 rows (the last answer token is never fed) and A hidden rows, for the last prompt token and every
answer token but the last. Later lines replace earlier ones of the same key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from .backbone import Backbone, attend

Key = tuple[str, int]


@dataclass(frozen=True)
class StateShape:
    """Dimensions that every record of a file shares."""

    num_msa_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: str = "bfloat16"


@dataclass
class States:
    """Base states of one text: keys and values (N_s, K, L, D), hidden (A, h)."""

    keys: Tensor
    values: Tensor
    hidden: Tensor


def _paths(prefix: str | Path) -> tuple[Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.jsonl")


class StateWriter:
    """Append states to `prefix`.bin and `prefix`.jsonl."""

    def __init__(self, prefix: str | Path, shape: StateShape) -> None:
        data, index = _paths(prefix)
        if index.exists():
            with index.open() as lines:
                given = json.loads(lines.readline())
            if given != asdict(shape):
                raise DataError(
                    f"{index} holds states of {given}, not of {asdict(shape)}; choose another file"
                )
        self.shape = shape
        self.data, self.index = data.open("ab"), index.open("a", encoding="utf-8")
        if self.index.tell() == 0:
            self.index.write(json.dumps(asdict(shape)) + "\n")

    def append(self, key: Key, states: States) -> None:
        offset = self.data.tell()
        for tensor in (states.keys, states.values, states.hidden):
            self.data.write(tensor.contiguous().view(torch.int16).numpy().tobytes())
        self.data.flush()
        length, answer = states.keys.shape[2], states.hidden.shape[0]
        line = {
            "source": key[0],
            "index": key[1],
            "offset": offset,
            "length": length,
            "answer": answer,
        }
        self.index.write(json.dumps(line) + "\n")
        self.index.flush()


class StateReader:
    """Random access to the states that a `StateWriter` wrote."""

    def __init__(self, prefix: str | Path) -> None:
        data, index = _paths(prefix)
        with index.open(encoding="utf-8") as lines:
            self.shape = StateShape(**json.loads(lines.readline()))
            entries = [json.loads(line) for line in lines if line.endswith("\n")]
        self.entries: dict[Key, tuple[int, int, int]] = {
            (e["source"], e["index"]): (e["offset"], e["length"], e["answer"]) for e in entries
        }
        self.data = data.open("rb")

    def __contains__(self, key: Key) -> bool:
        return key in self.entries

    def __getitem__(self, key: Key) -> States:
        offset, length, answer = self.entries[key]
        shape = self.shape
        kv_shape = (shape.num_msa_layers, shape.num_kv_heads, length, shape.head_dim)
        shapes = (kv_shape, kv_shape, (answer, shape.hidden_size))
        sizes = [math.prod(dims) for dims in shapes]
        self.data.seek(offset)
        whole = np.fromfile(self.data, dtype=np.int16, count=sum(sizes))
        parts = torch.from_numpy(whole).view(getattr(torch, shape.dtype)).split(sizes)
        return States(*(part.view(dims) for part, dims in zip(parts, shapes, strict=True)))


def compute_states(
    backbone: Backbone, prompt: Sequence[int], answer: Sequence[int], num_msa_layers: int
) -> States:
    """Run the base model over one text and keep what lossless training needs of it."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    L = ids.shape[1]
    first_layer, first_row = len(backbone.layers) - num_msa_layers, len(prompt) - 1
    positions = torch.arange(L)[None]
    x, rotation, kept = backbone.embed(ids), backbone.rotation(positions), []
    causal = positions[0] <= positions[0][:, None]
    hidden = x
    for index, layer in enumerate(backbone.layers):
        if index == first_layer:
            hidden = x[0, first_row:].clone()
        window = backbone.window(index)
        mask = (
            causal if window is None else causal & (positions[0][:, None] - positions[0] < window)
        )
        q, k, v = layer.queries_keys_values(x, rotation)
        x = layer.finish(x, attend(q, k, v, mask, layer.scale))
        if index >= first_layer:
            kept.append((k[0], v[0]))
    return States(torch.stack([k for k, _ in kept]), torch.stack([v for _, v in kept]), hidden)
