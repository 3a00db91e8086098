"""The other way: MLX stream files become a PyTorch checkpoint (schema 1), bit for bit.

So streams trained on a Mac run in the PyTorch reference, or train on there. Names and orientation
are turned back; no number changes, so there and back again gives the same bits.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from ..weights.checkpoint import load_streams
from ..weights.files import atomic_folder
from ..weights.tensorfile import TensorSpec, TensorWriter, dtype_name, to_bits
from .configs import stream_fields
from .reader import STREAMS

WEIGHTS = "stream_model.safetensors"
_TABLE: tuple[tuple[re.Pattern[str], str, bool], ...] = (
    (re.compile(r"stream_embeddings"), r"stream_embeddings.weight", False),
    (re.compile(r"(stream_init|next_token|pruner|conditioner)\.lora_a"), r"\1.lora_A.weight", True),
    (re.compile(r"(stream_init|next_token|pruner|conditioner)\.lora_b"), r"\1.lora_B.weight", True),
    (re.compile(r"conditioner\.(mlp_in|mlp_out)"), r"conditioner.\1.weight", False),
    (re.compile(r"(layers\..+)\.lora_a"), r"base_model.model.model.\1.lora_A.weight", True),
    (re.compile(r"(layers\..+)\.lora_b"), r"base_model.model.model.\1.lora_B.weight", True),
    (re.compile(r"(layers\.\d+)\.stream_gate"), r"base_model.model.model.\1.stream_gate", False),
)
"""MLX name -> schema-1 name, transposed or not."""


def write_pytorch(folder: Path, target: Path) -> None:
    """Write the streams of an MLX model or adapter folder as a schema-1 folder.

    Raises:
        StreamsError: `folder` holds no usable streams.
        OutputError: `target` exists or cannot be written.
    """
    streams = load_streams(folder)
    bits: dict[str, np.ndarray] = {}
    specs = []
    for name, tensor in streams.tensors.items():
        turned, transpose = pytorch_name(name)
        value = to_bits(tensor)
        bits[turned] = np.ascontiguousarray(value.T) if transpose else value
        specs.append(TensorSpec(turned, dtype_name(tensor.dtype), bits[turned].shape))
    specs.sort(key=lambda spec: spec.name)
    fields = stream_fields(streams.config, streams.base.name if streams.base else None)
    with atomic_folder(target, if_exists="error") as partial:
        with TensorWriter(partial / WEIGHTS, specs, {"format": "pt"}) as writer:
            for spec in specs:
                writer.write(bits[spec.name])
        text = json.dumps(fields, indent=1, ensure_ascii=False) + "\n"
        (partial / STREAMS).write_text(text, encoding="utf-8")


def pytorch_name(name: str) -> tuple[str, bool]:
    """Return the schema-1 name of an MLX stream tensor, and whether it is transposed there."""
    for pattern, turned, transpose in _TABLE:
        if match := pattern.fullmatch(name):
            return match.expand(turned), transpose
    raise AssertionError(f"load_streams let {name} pass")
