"""Stream weights on disk: `streams.safetensors` and `streams_config.json`.

    adapter/                     model/  (a plain mlx-lm folder, and still one)
      streams.safetensors          config.json, model.safetensors, tokenizer ...
      streams_config.json          streams.safetensors, streams_config.json

What the config asks for (`stream_tensors.py`) and what the file holds are compared before anything
is used. mlx-lm reads `model*.safetensors` only and does not see these files. The format is described
for writers of other programs in docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import StreamConfig
from ..errors import StreamsError, brief, shown
from .files import atomic_file, atomic_folder
from .fingerprint import base_dims, fingerprint, same_base
from .stream_tensors import check_tensors, stream_shapes
from .tensorfile import (
    TensorSpec,
    TensorWriter,
    dtype_name,
    is_finite,
    open_tensors,
    parse_json,
    read_file,
    to_bits,
    to_mlx,
)

__all__ = [
    "BaseFingerprint",
    "StreamWeights",
    "fingerprint",
    "load_streams",
    "save_streams",
    "stream_shapes",
]

WEIGHTS_FILE = "streams.safetensors"
CONFIG_FILE = "streams_config.json"
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class BaseFingerprint:
    """The base the streams were trained for: a name to find it by, a fingerprint to know it by."""

    name: str | None
    fingerprint: str | None


@dataclass(frozen=True)
class StreamWeights:
    """Loaded streams; `tensors` are complete, with the shapes of `stream_shapes(config, ...)`."""

    config: StreamConfig
    tensors: dict[str, mx.array]
    base: BaseFingerprint | None
    folder: Path
    metadata: dict[str, str] = field(default_factory=dict)

    def check_base(self, model: nn.Module) -> None:
        """Make sure that these streams belong to `model`, an mlx-lm model (quantised or not).

        Raises:
            StreamsError: sizes or fingerprint differ; says which, and which base is wanted.
        """
        name = self.base.name if self.base else None
        wanted = (
            f"; load them with {name}"
            if name
            else "; load them with the base model they were trained on"
        )
        dims = base_dims(model)
        if (
            self.base
            and self.base.fingerprint
            and (reason := same_base(self.base.fingerprint, fingerprint(model)))
        ):
            raise StreamsError(
                f"the streams in {self.folder} belong to another base model: {reason}{wanted}."
            )
        check_tensors(
            self.config,
            {key: tuple(value.shape) for key, value in self.tensors.items()},
            str(self.folder),
            dims,
        )


def load_streams(folder: Path | str) -> StreamWeights:
    """Read the stream files of a model folder or an adapter folder.

    Tensors are float16, bfloat16 or float32, as saved. Whether they fit a base model is checked by
    `StreamWeights.check_base`; that they fit their own config and each other is checked here.

    Raises:
        StreamsError: files missing, damaged, of two different saves or an unknown version; tensors
            missing, unknown, misshapen or not finite. One sentence.
    """
    folder = Path(folder).expanduser()
    path = folder / CONFIG_FILE
    fields = read_config(path)
    base = BaseFingerprint(
        _text_or_none(fields, "base_model", path), _text_or_none(fields, "base_fingerprint", path)
    )
    digest = _text_or_none(fields, "tensors_digest", path)
    metadata = fields.pop("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise StreamsError(f"{path}: metadata must map names to strings.")
    try:
        config = StreamConfig.from_dict(fields)
    except StreamsError as error:
        raise StreamsError(f"{path}: {brief(error, 500)}.") from None
    file = open_tensors(folder / WEIGHTS_FILE, StreamsError)
    if digest is not None and digest != file.metadata.get("tensors_digest"):
        raise StreamsError(
            f"{path} and {WEIGHTS_FILE} come from two different saves; copy or write both again."
        )
    _check_types(list(file.entries.values()), file.path)
    check_tensors(config, {spec.name: spec.shape for spec in file.entries.values()}, str(file.path))
    tensors = {
        spec.name: to_mlx(_check_finite(file.read(spec.name), spec, file.path), spec.dtype)
        for spec in file.entries.values()
    }
    known = base if base.name or base.fingerprint else None
    return StreamWeights(config, tensors, known, folder, metadata)


def save_streams(
    folder: Path | str,
    config: StreamConfig,
    tensors: dict[str, mx.array],
    *,
    base_model: str | None,
    fingerprint: str | None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the two stream files into `folder`, a new one or beside what it holds.

    A new folder appears whole or not at all. In an existing one the config is replaced last and
    carries a digest of the tensors, so a kill in between is noticed by `load_streams` instead of
    mixing two saves.

    Raises:
        StreamsError: the tensors do not fit the config or are not finite; nothing is written.
        OutputError: the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    check_tensors(
        config, {name: tuple(value.shape) for name, value in tensors.items()}, "these streams"
    )
    specs = [
        TensorSpec(name, dtype_name(value.dtype), tuple(value.shape))
        for name, value in sorted(tensors.items())
    ]
    _check_types(specs, folder)
    bits = {
        spec.name: _check_finite(to_bits(tensors[spec.name]), spec, "these streams")
        for spec in specs
    }
    digest = hashlib.sha256()
    for spec in specs:
        digest.update(f"{spec.name} {spec.dtype} {spec.shape}".encode())
        digest.update(np.ascontiguousarray(bits[spec.name]).data)
    ours = {
        "base_model": base_model,
        "base_fingerprint": fingerprint,
        "tensors_digest": digest.hexdigest()[:32],
        "metadata": metadata or {},
    }
    text = json.dumps({**config.to_dict(), **ours}, indent=2, ensure_ascii=False) + "\n"

    def write_weights(path: Path) -> None:
        with TensorWriter(
            path, specs, {"format": "mlx", "tensors_digest": str(ours["tensors_digest"])}
        ) as writer:
            for spec in specs:
                writer.write(bits[spec.name])

    if folder.is_dir() and any(folder.iterdir()):
        with atomic_file(folder / WEIGHTS_FILE, if_exists="replace") as path:
            write_weights(path)
        with atomic_file(folder / CONFIG_FILE, if_exists="replace") as path:
            path.write_text(text, encoding="utf-8")
        return
    with atomic_folder(folder, if_exists="error") as partial:
        write_weights(partial / WEIGHTS_FILE)
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")


def read_config(path: Path) -> dict[str, object]:
    """Return the fields of a streams config as they stand in the file.

    Raises:
        StreamsError: there is none, or it is no JSON object.
    """
    if not path.exists():
        raise StreamsError(
            f"{path.parent} holds no {path.name}; name a folder with stream weights, or make one"
            " with specstream convert or specstream train."
        )
    try:
        fields = parse_json(read_file(path, MAX_CONFIG_BYTES, StreamsError))
    except ValueError as error:
        raise StreamsError(f"{path} is not valid JSON ({brief(error)}); get it again.") from None
    if not isinstance(fields, dict):
        raise StreamsError(f"{path} must hold a JSON object; get the file again.")
    return fields


def _text_or_none(fields: dict[str, object], name: str, path: Path) -> str | None:
    value = fields.pop(name, None)
    if value is None or isinstance(value, str):
        return value
    raise StreamsError(f"{path}: {name} must be a string or null, got {shown(value)}.")


def _check_types(specs: Sequence[TensorSpec], path: Path) -> None:
    for spec in specs:
        if spec.dtype not in ("F32", "F16", "BF16"):
            raise StreamsError(
                f"{path}: {shown(spec.name)} is {spec.dtype}, expected F32, F16 or BF16."
            )


def _check_finite(bits: np.ndarray, spec: TensorSpec, path: Path | str) -> np.ndarray:
    if not is_finite(bits, spec.dtype):
        raise StreamsError(
            f"{path}: the tensor {shown(spec.name)} holds NaN or infinite values; the training run"
            " diverged or the file is damaged."
        )
    return bits
