"""Write a planned conversion: a folder that appears whole or not at all.

model.safetensors, or model-00001-of-0000N.safetensors ..., model.safetensors.index.json
config.json, tokenizer files, README.md
streams.safetensors, streams_config.json
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError, OptionError, shown
from ..weights.checkpoint import save_streams
from ..weights.files import atomic_folder
from ..weights.tensorfile import FLOATS, TensorWriter, to_mlx
from .card import model_card
from .plan import Plan
from .steps import Step

MAX_SHARD_BYTES = 5 << 30
Progress = Callable[[int], None]
"""Called with the bytes of each tensor written."""


@dataclass(frozen=True)
class Shard:
    """One weight file: its name and the steps whose tensors it holds."""

    name: str
    steps: tuple[Step, ...]


def write_plan(
    plan: Plan,
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
            _write_weights(folder, plan.base.steps, max_shard_bytes, notify)
            _write_json(folder / "config.json", plan.base.config)
            for name, content in plan.files.items():
                _write_file(folder / name, content)
        if plan.streams is not None:
            _write_streams(plan, folder, notify)
        figures = prove(folder) if prove else {}
        card = model_card(plan, target.name, figures)
        (folder / "README.md").write_text(card, encoding="utf-8")


def shards(steps: Sequence[Step], max_shard_bytes: int) -> list[Shard]:
    """Divide steps into files of at most this size (one tensor may be larger), mlx-lm's names."""
    groups: list[list[Step]] = []
    filled = 0
    for step in steps:
        size = sum(spec.nbytes for spec in step.outputs)
        if not groups or filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(step)
        filled += size
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def _write_weights(folder: Path, steps: Sequence[Step], limit: int, notify: Progress) -> None:
    weight_map: dict[str, str] = {}
    for shard in shards(steps, limit):
        specs = [spec for step in shard.steps for spec in step.outputs]
        with TensorWriter(folder / shard.name, specs, {"format": "mlx"}) as writer:
            for step in shard.steps:
                _write_step(writer, step)
                notify(sum(spec.nbytes for spec in step.outputs))
        weight_map |= {spec.name: shard.name for spec in specs}
    every = [spec for step in steps for spec in step.outputs]
    metadata = {
        "total_size": sum(spec.nbytes for spec in every),
        "total_parameters": sum(math.prod(spec.shape) for spec in every if spec.dtype in FLOATS),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_step(writer: TensorWriter, step: Step) -> None:
    tensor = step.plain_copy
    if tensor is None:
        for bits in step.make():
            writer.write(bits)
        return
    assert tensor.start is not None
    with tensor.stable():
        writer.copy(tensor.origin, tensor.start)


def _write_streams(plan: Plan, folder: Path, notify: Progress) -> None:
    assert plan.streams is not None
    tensors = {}
    for step in plan.streams.steps:
        spec, (bits,) = step.outputs[0], step.make()
        tensor = to_mlx(bits, spec.dtype)
        if not mx.all(mx.isfinite(tensor)).item():
            raise CheckpointError(
                f"{shown(step.sources[0])} holds NaN or infinite values as {spec.dtype}; the "
                "training diverged, or the values are too large for --stream-dtype."
            )
        tensors[spec.name] = tensor
        notify(spec.nbytes)
    save_streams(
        folder,
        plan.streams.config,
        tensors,
        base_model=plan.base_name,
        fingerprint=plan.base.fingerprint() if plan.base else None,
        metadata={"converted_from": plan.source.name},
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
