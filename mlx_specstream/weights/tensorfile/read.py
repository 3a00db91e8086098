"""Reading safetensors files, whose header is not trusted.

MLX's own loader trusts it. Here every claim in it is checked against the file before a byte of a
tensor is read: sizes match dtype x shape, ranges lie inside the file and follow each other without
overlap or hole, no name comes twice.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import numpy as np

from ...errors import SpecStreamError, brief, shown
from .bits import NUMPY_TYPES, TensorSpec
from .bounded import open_file, parse_json

MAX_HEADER_BYTES = 32 << 20
MAX_DIMENSIONS = 8
_FOREIGN = (
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4", "C64",
)  # fmt: skip


class _ForeignError(ValueError):
    """A tensor of a type that safetensors has and this reader has not."""


@dataclass(frozen=True)
class TensorEntry(TensorSpec):
    """A tensor of a file, whose bytes start at `start` (counted from the beginning of the file)."""

    start: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been checked."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """Read one tensor's bits, shape as in its entry."""
        entry = self.entries[name]
        bits = np.empty(entry.shape, NUMPY_TYPES[entry.dtype])
        with self.path.open("rb", buffering=0) as file:
            read_exactly(file, entry.start, bits)
        return bits


def read_exactly(file: RawIOBase, start: int, into: np.ndarray) -> None:
    """Fill the C-contiguous array `into` with the bytes of an unbuffered file from `start` on.

    Raises:
        EOFError: the file has become shorter than it was.
    """
    view = into.reshape(-1).view(np.uint8).data
    file.seek(start)
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + (64 << 20)])
        if not count:
            raise EOFError("the file ends early")
        done += count


def open_tensors(path: Path, error: type[SpecStreamError]) -> TensorFile:
    """Read and check the header of a safetensors file.

    Raises:
        error: the file is missing, truncated, or its header does not describe it; one sentence.
    """
    with open_file(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise error(
                f"{path} is not a safetensors file or is cut short (header of {length} bytes);"
                " get it again."
            )
        text = file.read(length)
    try:
        header = parse_json(text, _unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
        metadata = _metadata(header.pop("__metadata__", None) or {})  # MLX writes null
        entries = [_entry(name, value, 8 + length) for name, value in header.items()]
        _check_layout(entries, 8 + length, size)
    except _ForeignError as failure:
        raise error(
            f"{path} holds {failure}, which is not read here; take the model's release in 16 or 32 bits."
        ) from None
    except ValueError as failure:
        raise error(
            f"{path} has a damaged safetensors header: {brief(failure, 500)}; get the file again."
        ) from None
    return TensorFile(path, {entry.name: entry for entry in entries}, metadata)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("__metadata__ must map names to strings")
    return dict(value)


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    what = shown(name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype in _FOREIGN:
        raise _ForeignError(f"{what} in the number format {dtype}")
    if not isinstance(dtype, str) or dtype not in NUMPY_TYPES:
        raise ValueError(
            f"{what} has the dtype {shown(dtype)}, which is not one of {', '.join(NUMPY_TYPES)}"
        )
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{what} has the shape {shown(shape)}, which is not a list of sizes")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{what} has the offsets {shown(offsets)}, which are not a range")
    entry = TensorEntry(name, dtype, tuple(shape), data_start + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise ValueError(
            f"{what} {dtype} {shown(list(shape))} needs {shown(entry.nbytes)} bytes but has"
            f" {shown(offsets[1] - offsets[0])}"
        )
    return entry


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number < 1 << 62 for number in value
    )


def _check_layout(entries: Sequence[TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != position:
            relation = "overlaps" if entry.start < position else "leaves a hole after"
            raise ValueError(f"{shown(entry.name)} {relation} the tensor before it")
        position += entry.nbytes
    if position != size:
        raise ValueError(f"the tensors end at byte {position}, the file at {size}")
