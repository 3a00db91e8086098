"""The adapter tensors of a checkpoint: what they are, and the steps that write or merge them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from ..config import StreamConfig
from ..errors import CheckpointError, OptionError, shown
from ..weights.fingerprint import BaseDims
from ..weights.stream_tensors import shapes_by_names
from ..weights.tensorfile import difference
from .base import DTYPES, LoraPair
from .configs import peft_adapter, stream_config
from .reader import ADAPTER_WEIGHTS, STREAMS, Checkpoint
from .tensors import Tensor

Merge = Literal["none", "lower", "all"]
LAYER = re.compile(r"layers\.(\d+)\.(.+)\.lora_([ab])")


def read_adapters(
    checkpoint: Checkpoint, named: dict[str, Tensor], merge: Merge
) -> tuple[StreamConfig | None, dict[str, LoraPair]]:
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
        return None, lora_deltas(named, adapter.rank, adapter.scale)
    if named:
        first = next(iter(named.values()))
        raise CheckpointError(
            f"{folder} holds {shown(first.sources[0][1])} but no {STREAMS} that says what the streams are; "
            "write one as docs/checkpoint-format.md describes."
        )
    return None, {}


def lora_deltas(named: Mapping[str, Tensor], rank: int, scale: float) -> dict[str, LoraPair]:
    """Pair A and B of every adapted module, under the name of the weight they change.

    Raises:
        CheckpointError: a half has no other or is of another rank, or the tensor adapts no layer.
    """
    deltas = {}
    for name, each in named.items():
        match = LAYER.fullmatch(name)
        other = named.get(f"{name[:-1]}{'b' if name.endswith('a') else 'a'}")
        if not match or other is None:
            raise CheckpointError(f"the adapter tensor {shown(each.origin)} stands alone.")
        if len(each.shape) != 2 or each.shape[match[3] == "a"] != rank:
            raise CheckpointError(
                f"the adapter tensor {shown(each.origin)} is not of rank {rank}, as its config says."
            )
        if match[3] == "a":
            deltas[f"model.layers.{match[1]}.{match[2]}.weight"] = LoraPair(each, other, scale)
    return deltas


def refuse_more_than_lora(own_base: Iterable[Tensor]) -> None:
    """Refuse what an adapter has for embeddings or the head, or holds whole: no layer's LoRA."""
    for tensor in own_base:
        for path, name in tensor.sources:
            if path.stem == ADAPTER_WEIGHTS or ".lora_" in name:
                raise CheckpointError(
                    f"the adapter tensor {shown(tensor.origin)} is not the LoRA of a layer's module; "
                    "merge the adapter in PEFT (merge_and_unload) and convert the result."
                )


def stream_tensors(
    config: StreamConfig,
    named: Mapping[str, Tensor],
    dims: BaseDims | None,
    path: Path,
    dtype: str | None,
) -> tuple[Tensor, ...]:
    """Check the stream tensors against their config (and base) and plan each.

    dtype: float16, bfloat16 or float32; None for each tensor's own.

    Raises:
        CheckpointError: a tensor is not of floats, unknown, missing or misshapen.
        StreamsError: the streams do not fit the base.
    """
    for name, tensor in named.items():
        if not tensor.is_float:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, expected floats.")
    if dims is not None:
        found = {name: tensor.shape for name, tensor in named.items()}
        called = {name: tensor.sources[0][1] for name, tensor in named.items()}
        if odd := difference(found, shapes_by_names(config, named, dims), called):
            raise CheckpointError(f"{path}: {odd}; check {STREAMS} and the base, or see --rules.")
    tensors = [named[name] for name in sorted(named)]
    return tuple(tensor.cast(DTYPES[dtype]) if dtype else tensor for tensor in tensors)
