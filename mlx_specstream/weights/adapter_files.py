"""An adapter folder: a file of tensors and a JSON config that says what they are and of which base.

Streams and other drafters are saved so. What is read is checked: JSON and tensors at a bounded
cost, types, finite values, and that both files come from the same save.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import StreamsError, brief, shown
from .files import atomic_file, atomic_folder
from .fingerprint import fingerprint, same_base
from .tensorfile import (
    FLOATS,
    TensorFile,
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

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class BaseFingerprint:
    """The base an adapter was trained for: a name to find it by, a fingerprint to know it by."""

    name: str | None
    fingerprint: str | None


def check_fingerprint(
    what: str, folder: Path, base: BaseFingerprint | None, model: nn.Module
) -> None:
    """Make sure that an adapter (`what`, in the plural) belongs to `model`, quantised or not.

    Raises:
        StreamsError: the fingerprint is another's; says how, and which base is wanted.
    """
    if base is None or not base.fingerprint:
        return
    if reason := same_base(base.fingerprint, fingerprint(model)):
        name = base.name or "the base model they were trained on"
        raise StreamsError(
            f"the {what} in {folder} belong to another base model: {reason}; load them with {name}."
        )


Config = TypeVar("Config")


@dataclass(frozen=True)
class AdapterWeights(Generic[Config]):
    """A loaded adapter; `tensors` are complete, with the names and shapes that `config` asks for."""

    config: Config
    tensors: dict[str, mx.array]
    base: BaseFingerprint | None
    folder: Path
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter folder whose config has been read and whose tensors have not.

    `fields`: of the config, less those that every adapter has.
    """

    folder: Path
    config_path: Path
    fields: dict[str, object]
    base: BaseFingerprint | None
    metadata: dict[str, str]
    file: TensorFile

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        return {spec.name: spec.shape for spec in self.file.entries.values()}

    def config(self, read: Callable[[dict[str, object]], Config]) -> Config:
        """Return the config that `read` makes of the fields.

        Raises:
            StreamsError: it makes no sense; the file is named.
        """
        try:
            return read(self.fields)
        except StreamsError as error:
            raise StreamsError(f"{self.config_path}: {brief(error, 500)}.") from None

    def tensors(self) -> dict[str, mx.array]:
        """Read the tensors.

        Raises:
            StreamsError: one holds NaN or infinite values.
        """
        return {
            spec.name: to_mlx(
                _check_finite(self.file.read(spec.name), spec, self.file.path), spec.dtype
            )
            for spec in self.file.entries.values()
        }


@dataclass(frozen=True)
class AdapterFiles:
    """The names of one kind of adapter's two files, and what they hold in words.

    `tables`: tensors of integers (I32) that it may hold beside those of floats.
    """

    weights: str
    config: str
    what: str
    tables: Sequence[str] = ()

    def open(self, folder: Path | str) -> OpenAdapter:
        """Read the config of a folder and open its tensors.

        Raises:
            StreamsError: files missing, damaged or of two different saves, or tensors of another
                type.
        """
        folder = Path(folder).expanduser()
        path = folder / self.config
        fields = self.read_config(path)
        base = BaseFingerprint(
            _text_or_none(fields, "base_model", path),
            _text_or_none(fields, "base_fingerprint", path),
        )
        digest = _text_or_none(fields, "tensors_digest", path)
        metadata = fields.pop("metadata", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise StreamsError(f"{path}: metadata must map names to strings.")
        file = open_tensors(folder / self.weights, StreamsError)
        if digest is not None and digest != file.metadata.get("tensors_digest"):
            raise StreamsError(
                f"{path} and {self.weights} come from two different saves; copy or write both again."
            )
        self._check_types(list(file.entries.values()), file.path)
        known = base if base.name or base.fingerprint else None
        return OpenAdapter(folder, path, fields, known, metadata, file)

    def save(
        self,
        folder: Path | str,
        fields: Mapping[str, object],
        tensors: Mapping[str, mx.array],
        base: BaseFingerprint,
        metadata: Mapping[str, str] | None,
        source: str,
    ) -> None:
        """Write both files into `folder`, a new one or beside what it holds.

        A new folder appears whole or not at all. In an existing one the config is replaced last and
        carries a digest of the tensors, so a kill in between is noticed by `open` instead of mixing
        two saves. `source`: what the tensors are, for messages.

        Raises:
            StreamsError: a tensor is of another type or not finite; nothing is written.
            OutputError: the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        specs = [
            TensorSpec(name, dtype_name(value.dtype), tuple(value.shape))
            for name, value in sorted(tensors.items())
        ]
        self._check_types(specs, folder)
        bits = {
            spec.name: _check_finite(to_bits(tensors[spec.name]), spec, source) for spec in specs
        }
        digest = hashlib.sha256()
        for spec in specs:
            digest.update(f"{spec.name} {spec.dtype} {spec.shape}".encode())
            digest.update(np.ascontiguousarray(bits[spec.name]).data)
        ours = {
            "base_model": base.name,
            "base_fingerprint": base.fingerprint,
            "tensors_digest": digest.hexdigest()[:32],
            "metadata": dict(metadata or {}),
        }
        text = json.dumps({**fields, **ours}, indent=2, ensure_ascii=False) + "\n"

        def write_weights(path: Path) -> None:
            with TensorWriter(
                path, specs, {"format": "mlx", "tensors_digest": str(ours["tensors_digest"])}
            ) as writer:
                for spec in specs:
                    writer.write(bits[spec.name])

        if folder.is_dir() and any(folder.iterdir()):
            with atomic_file(folder / self.weights, if_exists="replace") as path:
                write_weights(path)
            with atomic_file(folder / self.config, if_exists="replace") as path:
                path.write_text(text, encoding="utf-8")
            return
        with atomic_folder(folder, if_exists="error") as partial:
            write_weights(partial / self.weights)
            (partial / self.config).write_text(text, encoding="utf-8")

    def read_config(self, path: Path) -> dict[str, object]:
        """Return the fields of a config as they stand in the file.

        Raises:
            StreamsError: there is none, or it is no JSON object.
        """
        if not path.exists():
            raise StreamsError(
                f"{path.parent} holds no {path.name}; name a folder with {self.what}, or make one"
                " with specstream convert or specstream train."
            )
        try:
            fields = parse_json(read_file(path, MAX_CONFIG_BYTES, StreamsError))
        except ValueError as error:
            raise StreamsError(
                f"{path} is not valid JSON ({brief(error)}); get it again."
            ) from None
        if not isinstance(fields, dict):
            raise StreamsError(f"{path} must hold a JSON object; get the file again.")
        return fields

    def _check_types(self, specs: Sequence[TensorSpec], path: Path) -> None:
        for spec in specs:
            wanted = ("I32",) if spec.name in self.tables else ("F32", "F16", "BF16")
            if spec.dtype not in wanted:
                raise StreamsError(
                    f"{path}: {shown(spec.name)} is {spec.dtype}, expected "
                    f"{' or '.join(wanted) if len(wanted) < 3 else 'F32, F16 or BF16'}."
                )


def _text_or_none(fields: dict[str, object], name: str, path: Path) -> str | None:
    value = fields.pop(name, None)
    if value is None or isinstance(value, str):
        return value
    raise StreamsError(f"{path}: {name} must be a string or null, got {shown(value)}.")


def _check_finite(bits: np.ndarray, spec: TensorSpec, path: Path | str) -> np.ndarray:
    if spec.dtype in FLOATS and not is_finite(bits, spec.dtype):
        raise StreamsError(
            f"{path}: the tensor {shown(spec.name)} holds NaN or infinite values; the training run"
            " diverged or the file is damaged."
        )
    return bits
