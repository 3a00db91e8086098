"""A GGUF file as an mlx-lm folder: exact float32 weights, config, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ...weights.tensorfile import TensorWriter
from ..tensors import Tensor
from .architecture import (
    WantedTensor,
    model_config,
    unpermute,
    wanted_tensors,
)
from .file import GGUFFile
from .quants import Floats
from .tokenizer import token_ids, tokenizer_files

Progress = Callable[[int, int], None]
"""Called with bytes written so far and in all."""


def write_model_folder(gguf: GGUFFile, folder: Path, progress: Progress | None = None) -> None:
    """Fill an existing folder with the model; one tensor is in memory at a time.

    Everything but the weights is worked out first, so most damage is found before anything is written.

    Raises:
        CheckpointError: the model is of a kind that is not converted, or damaged.
    """
    tensors = gguf_tensors(gguf)
    ids = token_ids(gguf)
    files = {
        "config.json": _json({**model_config(gguf), **ids}),
        "generation_config.json": _json({"_from_model_config": True, **ids}),
        **tokenizer_files(gguf),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0
    with TensorWriter(folder / "model.safetensors", tensors, {"format": "pt"}) as writer:
        for tensor in tensors:
            writer.write(tensor.make()[0])
            done += tensor.nbytes
            if progress:
                progress(done, total)


def gguf_tensors(gguf: GGUFFile) -> list[Tensor]:
    """Return the model's tensors as float32, in the names and orders of Hugging Face folders.

    Raises:
        CheckpointError: a tensor is missing, unknown or misshapen.
    """
    return [
        Tensor.in_file(
            wanted.source,
            "F32",
            wanted.shape,
            gguf.path,
            partial(_read, gguf, wanted),
            operations=("dequantise",),
        ).renamed(wanted.name)
        for wanted in wanted_tensors(gguf)
    ]


def _read(gguf: GGUFFile, tensor: WantedTensor) -> Floats:
    values = gguf.read(tensor.source)
    if tensor.plus_one:  # exact for weights that had 16 bits once
        values = values - np.float32(1)
    return unpermute(values, tensor.permuted_heads) if tensor.permuted_heads else values


def _json(values: dict[str, object]) -> str:
    return json.dumps(values, indent=2) + "\n"
