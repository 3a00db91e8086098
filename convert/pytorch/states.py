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
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...train.data import Key
from .backbone import TorchBackbone, attend


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


def state_files(prefix: str | Path) -> tuple[Path, Path]:
    """Return the two files of a prefix, data and index."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.jsonl")


def _read_shape(line: str, index: Path) -> StateShape:
    """Read the first line of an index.

    Raises:
        DataError: it is something else, such as a file of answers.
    """
    try:
        return StateShape(**json.loads(line))
    except (json.JSONDecodeError, TypeError):
        raise DataError(
            f"{index} is no index of base states, which distill --states writes; give another prefix."
        ) from None


class StateWriter:
    """Append states to `prefix`.bin and `prefix`.jsonl."""

    def __init__(self, prefix: str | Path, shape: StateShape) -> None:
        data, index = state_files(prefix)
        if index.exists():
            with index.open(encoding="utf-8") as lines:
                given = _read_shape(lines.readline(), index)
            if given != shape:
                raise DataError(
                    f"{index} holds states of {asdict(given)}, not of {asdict(shape)}; choose another file"
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
    """Random access to the states that `StateWriter`s wrote, under one prefix or several.

    Raises:
        DataError: states of different shapes.
    """

    def __init__(self, *prefixes: str | Path) -> None:
        self.entries: dict[Key, tuple[BinaryIO, int, int, int]] = {}
        shapes = []
        for prefix in prefixes:
            data, index = state_files(prefix)
            with index.open(encoding="utf-8") as lines:
                shapes.append(_read_shape(lines.readline(), index))
                entries = [json.loads(line) for line in lines if line.endswith("\n")]
            file = data.open("rb")
            for e in entries:
                key = (e["source"], e["index"])
                self.entries[key] = (file, e["offset"], e["length"], e["answer"])
        if any(shape != shapes[0] for shape in shapes):
            raise DataError("the base states given were kept for different layers; give one kind.")
        self.shape = shapes[0]

    def __contains__(self, key: Key) -> bool:
        return key in self.entries

    def __getitem__(self, key: Key) -> States:
        file, offset, length, answer = self.entries[key]
        shape = self.shape
        kv_shape = (shape.num_msa_layers, shape.num_kv_heads, length, shape.head_dim)
        shapes = (kv_shape, kv_shape, (answer, shape.hidden_size))
        sizes = [math.prod(dims) for dims in shapes]
        file.seek(offset)
        whole = np.fromfile(file, dtype=np.int16, count=sum(sizes))
        parts = torch.from_numpy(whole).view(getattr(torch, shape.dtype)).split(sizes)
        return States(*(part.view(dims) for part, dims in zip(parts, shapes, strict=True)))


def compute_states(
    backbone: TorchBackbone, prompt: Sequence[int], answer: Sequence[int], num_msa_layers: int
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
