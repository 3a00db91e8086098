"""Write a planned conversion: a folder that appears whole or not at all.

model.safetensors, or model-00001-of-0000N.safetensors ..., model.safetensors.index.json
config.json, tokenizer files, README.md
streams.safetensors, streams_config.json    or drafter.safetensors, drafter_config.json
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError, OptionError, printable
from ..weights.checkpoint import save_streams
from ..weights.drafter import save_drafter
from ..weights.files import atomic_folder
from ..weights.tensorfile import FLOATS, TensorWriter, to_mlx
from .card import model_card
from .plan import ConversionPlan
from .tensors import Tensor, readable

MAX_SHARD_BYTES = 5 << 30
Progress = Callable[[int], None]
"""Called with the bytes of each tensor written."""


@dataclass(frozen=True)
class Shard:
    """One weight file: its name and the tensors it holds."""

    name: str
    tensors: tuple[Tensor, ...]


def write_plan(
    plan: ConversionPlan,
    target: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    prove: Callable[[Path], dict[str, str]] | None = None,
) -> None:
    """Carry out a plan.

    Args:
        target: the folder to make; must not exist.
        prove: called with the finished folder before it gets its name; returns figures for the
            model card.

    Raises:
        OutputError: `target` exists or cannot be written; nothing is left behind.
        CheckpointError: the source changed meanwhile, or holds NaN in its streams.
    """
    notify = progress or (lambda _: None)
    with atomic_folder(target, if_exists="error") as folder:
        mx.set_cache_limit(0)
        if plan.base is not None and plan.writes_base:
            _write_weights(folder, plan.base.tensors, max_shard_bytes, notify)
            _write_json(folder / "config.json", plan.base.config)
            for name, content in plan.files.items():
                _write_file(folder / name, content)
        if plan.streams is not None:
            _write_streams(plan, folder, notify)
        if plan.drafter is not None:
            _write_drafter(plan, folder, notify)
        figures = prove(folder) if prove else {}
        card = model_card(plan, printable(target.name), figures)
        (folder / "README.md").write_text(card, encoding="utf-8")


def shards(tensors: Sequence[Tensor], max_shard_bytes: int) -> list[Shard]:
    """Divide tensors into files of at most this size (one tensor may be larger), mlx-lm's names."""
    groups: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        size = sum(spec.nbytes for spec in tensor.outputs)
        if not groups or filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def _write_weights(folder: Path, tensors: Sequence[Tensor], limit: int, notify: Progress) -> None:
    weight_map: dict[str, str] = {}
    for shard in shards(tensors, limit):
        specs = [spec for tensor in shard.tensors for spec in tensor.outputs]
        with TensorWriter(folder / shard.name, specs, {"format": "mlx"}) as writer:
            for tensor in shard.tensors:
                _write_tensor(writer, tensor)
                notify(sum(spec.nbytes for spec in tensor.outputs))
        weight_map |= {spec.name: shard.name for spec in specs}
    every = [spec for tensor in tensors for spec in tensor.outputs]
    metadata = {
        "total_size": sum(spec.nbytes for spec in every),
        "total_parameters": sum(math.prod(spec.shape) for spec in every if spec.dtype in FLOATS),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_tensor(writer: TensorWriter, tensor: Tensor) -> None:
    """Write what a tensor becomes; where it is what its file holds, the bytes are copied."""
    if tensor.start is None:
        for bits in tensor.make():
            writer.write(bits)
        return
    path = tensor.sources[0][0]
    with readable(path):
        writer.copy(path, tensor.start)


def _made(tensors: Sequence[Tensor], notify: Progress) -> dict[str, mx.array]:
    """Return what tensors become, by name."""
    made = {}
    for tensor in tensors:
        made[tensor.name] = to_mlx(tensor.make()[0], tensor.dtype)
        notify(tensor.nbytes)
    return made


def _write_drafter(plan: ConversionPlan, folder: Path, notify: Progress) -> None:
    assert plan.drafter is not None
    save_drafter(
        folder,
        plan.drafter.config,
        _made(plan.drafter.tensors, notify),
        base_model=plan.base_name,
        fingerprint=plan.base.fingerprint() if plan.base else None,
        metadata={"converted_from": plan.path.name},
    )


def _write_streams(plan: ConversionPlan, folder: Path, notify: Progress) -> None:
    assert plan.streams is not None
    save_streams(
        folder,
        plan.streams.config,
        _made(plan.streams.tensors, notify),
        base_model=plan.base_name,
        fingerprint=plan.base.fingerprint() if plan.base else None,
        metadata={"converted_from": plan.path.name},
    )


def _write_file(path: Path, content: Path | str) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
        return
    try:
        shutil.copyfile(content, path)
    except OSError as error:
        if error.filename and Path(error.filename) == content:
            raise CheckpointError(f"{content} cannot be read ({error.strerror}).") from None
        raise


def _write_json(path: Path, value: dict[str, object]) -> None:
    try:
        text = json.dumps(value, indent=4, sort_keys=True, allow_nan=False)
    except ValueError:
        raise OptionError(
            f"{path.name} would hold NaN or infinity; correct it at its source."
        ) from None
    path.write_text(text + "\n", encoding="utf-8")
