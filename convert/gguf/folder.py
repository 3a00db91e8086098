"""A GGUF file as an mlx-lm folder: exact float32 weights, config, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...errors import CheckpointError
from ...weights.tensorfile import TensorSpec, TensorWriter
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
    wanted = wanted_tensors(gguf)
    ids = token_ids(gguf)
    files = {
        "config.json": _json({**model_config(gguf), **ids}),
        "generation_config.json": _json({"_from_model_config": True, **ids}),
        **tokenizer_files(gguf),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    _write_weights(gguf, wanted, folder / "model.safetensors", progress)


def read_tensor(gguf: GGUFFile, tensor: WantedTensor) -> Floats:
    """Return one tensor as the model wants it.

    Raises:
        CheckpointError: it holds infinities or values that are no numbers.
    """
    values = gguf.read(tensor.source)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{gguf.path} is damaged: the tensor {tensor.source!r} holds values that are no numbers."
        )
    if tensor.plus_one:  # exact for weights that had 16 bits once
        values = values - np.float32(1)
    return unpermute(values, tensor.permuted_heads) if tensor.permuted_heads else values


def _write_weights(
    gguf: GGUFFile, wanted: list[WantedTensor], path: Path, progress: Progress | None
) -> None:
    specs = [TensorSpec(tensor.name, "F32", tensor.shape) for tensor in wanted]
    total = sum(spec.nbytes for spec in specs)
    done = 0
    with TensorWriter(path, specs, {"format": "pt"}) as writer:
        for tensor, spec in zip(wanted, specs, strict=True):
            writer.write(read_tensor(gguf, tensor))
            done += spec.nbytes
            if progress:
                progress(done, total)


def _json(values: dict[str, object]) -> str:
    return json.dumps(values, indent=2) + "\n"
