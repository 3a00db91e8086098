"""The adapter tensors of a checkpoint: what they are, and the steps that write or merge them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ..config import StreamConfig
from ..errors import CheckpointError, OptionError, shown
from ..weights.fingerprint import BaseDims
from ..weights.stream_tensors import shapes_by_names
from ..weights.tensorfile import FLOATS, TensorSpec
from .base import DTYPES
from .configs import peft_adapter, stream_config
from .names import Named, nearest
from .reader import STREAMS, Checkpoint
from .steps import Delta, Step, plain_dtype

Merge = Literal["none", "lower", "all"]
LAYER = re.compile(r"layers\.(\d+)\.(.+)\.lora_([ab])")


def read_adapters(
    checkpoint: Checkpoint, named: dict[str, Named], merge: Merge
) -> tuple[StreamConfig | None, dict[str, Delta]]:
    """Say what the adapter tensors are: streams with a config, or a plain LoRA to merge.

    Raises:
        CheckpointError: the configs contradict each other, or nothing says what the tensors are.
        OptionError: the LoRA is a plain adapter and only its lower layers are to be merged.
    """
    folder = checkpoint.folder
    if checkpoint.stream_fields is not None:
        shapes = {name: each.shape for name, each in named.items()}
        config = stream_config(checkpoint.stream_fields, shapes, folder / STREAMS)
        if checkpoint.adapter_fields is not None:
            scale = peft_adapter(checkpoint.adapter_fields, folder / "adapter_config.json").scale
            if abs(scale - config.lora_scale) > 1e-6 * abs(scale):
                raise CheckpointError(
                    f"{folder}: adapter_config.json scales LoRA by {scale:g}, {STREAMS} by "
                    f"{config.lora_scale:g}; they must agree."
                )
        return config, {}
    if checkpoint.adapter_fields is not None and "stream_embeddings" not in named:
        adapter = peft_adapter(checkpoint.adapter_fields, folder / "adapter_config.json")
        if merge == "lower":
            raise OptionError("--merge-lora lower is for shared streams; this is a plain adapter.")
        return None, lora_deltas(named, adapter.scale)
    if named:
        first = next(iter(named.values())).sources[0]
        raise CheckpointError(
            f"{folder} holds {shown(first.name)} but no {STREAMS} that says what the streams are; "
            "write one as docs/checkpoint-format.md describes."
        )
    return None, {}


def lora_deltas(named: Mapping[str, Named], scale: float) -> dict[str, Delta]:
    """Pair A and B of every adapted module, under the name of the weight they change.

    Raises:
        CheckpointError: a half has no other, or the tensor adapts no layer.
    """
    deltas = {}
    for name, each in named.items():
        match = LAYER.fullmatch(name)
        other = named.get(f"{name[:-1]}{'b' if name.endswith('a') else 'a'}")
        if not match or other is None:
            raise CheckpointError(f"the adapter tensor {shown(each.sources[0].name)} stands alone.")
        if match[3] == "a":
            a, b = (dataclasses.replace(half, transpose=False) for half in (each, other))
            deltas[f"model.layers.{match[1]}.{match[2]}.weight"] = Delta(a, b, scale)
    return deltas


def stream_steps(
    config: StreamConfig,
    named: Mapping[str, Named],
    dims: BaseDims | None,
    where: Path,
    dtype: str | None,
) -> tuple[Step, ...]:
    """Check the stream tensors against their config (and base) and plan each.

    dtype: float16, bfloat16 or float32; None for each tensor's own.

    Raises:
        CheckpointError: a tensor is not of floats, unknown, missing or misshapen.
        StreamsError: the streams do not fit the base.
    """
    for name, each in named.items():
        if plain_dtype(each) not in FLOATS:
            raise CheckpointError(f"{where}: {name} is {each.sources[0].dtype}, expected floats.")
    if dims is not None:
        _compare(named, shapes_by_names(config, named, dims), where)
    target = DTYPES[dtype] if dtype else None
    steps = []
    for name in sorted(named):
        own = target or plain_dtype(named[name])
        spec = TensorSpec(name, own, named[name].shape)
        steps.append(Step.of((spec,), named[name], own))
    return tuple(steps)


def _compare(
    named: Mapping[str, Named], expected: Mapping[str, tuple[int, ...]], where: Path
) -> None:
    for name, each in named.items():
        given = each.sources[0]
        if name not in expected:
            raise CheckpointError(
                f"{where}: {shown(given.name)} means {nearest(name, each.shape, expected)}; check "
                f"{STREAMS}, or drop it with --rules."
            )
        if each.shape != expected[name]:
            raise CheckpointError(
                f"{where}: {shown(given.name)} {given.shape} means {name} {each.shape}, expected "
                f"{expected[name]}; check {STREAMS} and the base model."
            )
    for name, shape in expected.items():
        if name not in named:
            raise CheckpointError(
                f"{where}: no tensor means {name} {shape}, which {STREAMS} asks for."
            )
