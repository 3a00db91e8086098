"""The GGUF container, read without trust: metadata and where each tensor's bytes are.

    | "GGUF" | version | number of tensors | number of metadata pairs |
    | metadata: key, type, value ... | tensors: name, shape, format, offset ... | padding | tensor bytes ... |

Every count, length and offset is checked against the file's size before anything is allocated for it, so a damaged or
hostile file is a `CheckpointError` that says where, and what it costs to find out is bounded.

The package `gguf` has a reader, too. It is not used: it makes an array for every item of a list (22 seconds and 700 MB
for a file of 1 MB) and goes on after the end of the file (49 bytes that claim 2^40 items take all memory).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError
from .quants import (
    FORMATS,
    UNREAD_FORMATS,
    Bytes,
    Floats,
    Format,
    dequantize,
)

Value = bool | int | float | str | list[Any]
"""A metadata value; a list is flat in every file met so far, but may nest."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4
_MAX_NAME_BYTES = 65535
_MAX_ITEMS = 4_000_000
"""Tensors, pairs and items of lists; Gemma 3, with the largest vocabulary, has 1.3 million."""
_LEAST_PAIR_BYTES = 8 + 4 + 1  # an empty key, its type, a one-byte value
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, format, offset

_SCALARS: dict[int, str] = {
    0: "B",
    1: "b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""struct formats of the metadata types that are numbers."""
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor is and how its numbers are written; shape slowest axis first, as NumPy has it."""

    name: str
    shape: tuple[int, ...]
    number_format: Format
    start: int

    @property
    def num_bytes(self) -> int:
        return self.number_format.num_bytes(math.prod(self.shape))


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file: metadata in memory, tensor bytes mapped."""

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, GGUFTensor]
    mapped: Bytes

    def read(self, name: str) -> Floats:
        """Return a tensor as float32, dequantised exactly."""
        tensor = self.tensors[name]
        raw = self.mapped[tensor.start : tensor.start + tensor.num_bytes]
        return dequantize(raw, tensor.number_format, tensor.shape)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number of the metadata; without a default the key must be there."""
        return self._typed(key, int, "a whole number", default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number of the metadata; without a default the key must be there."""
        value = self._typed(key, (int, float), "a number", default)
        if not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {key} is {value}, which is no use as a number.")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string of the metadata; without a default the key must be there."""
        return self._typed(key, str, "a string", default)

    def flag(self, key: str, default: bool) -> bool:
        """Return a yes or no of the metadata."""
        return self._typed(key, bool, "true or false", default)

    def items(self, key: str, kind: type) -> list[Any]:
        """Return a list of the metadata whose items are all of one kind; the key must be there."""
        values: list[Any] = self._typed(key, list, "a list", None)
        if not all(type(value) is kind for value in values):
            raise CheckpointError(
                f"{self.path}: {key} should be a list of {kind.__name__} and holds something else."
            )
        return values

    def _typed(self, key: str, kinds: type | tuple[type, ...], wanted: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(
                f"{self.path}: the metadata has no {key}, so this model cannot be converted."
            )
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise CheckpointError(
                f"{self.path}: {key} should be {wanted} and is a {type(value).__name__}."
            )
        return value


def open_gguf(path: str | Path) -> GGUFFile:
    """Read a GGUF file's metadata and tensor table, and map its tensors.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, of another version, or part of a split model.
    """
    path = Path(path)
    try:
        size = path.stat().st_size if path.is_file() else None
        mapped = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if size is None:
        raise CheckpointError(f"{path} is not a file; name a .gguf file.")
    scanner = _Scanner(path, mapped)
    version, num_tensors, num_pairs = _preamble(scanner)
    metadata = _metadata(scanner, num_pairs)
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path} is one part of a model split over several files; merge them first (llama-gguf-split --merge)."
        )
    tensors = _tensors(scanner, num_tensors, _alignment(path, metadata))
    return GGUFFile(path, version, metadata, tensors, mapped)


class _Scanner:
    """A position in the mapped file; every step checks that what it reads lies inside."""

    def __init__(self, path: Path, mapped: Bytes) -> None:
        self.path = path
        self._bytes = mapped.data
        self.at = 0
        self._items = 0

    @property
    def left(self) -> int:
        return len(self._bytes) - self.at

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged or not a whole GGUF file: {what} (at byte {self.at})."
        )

    def take(self, num_bytes: int, what: str) -> memoryview:
        if num_bytes > self.left:
            raise self.fail(f"{what} needs {num_bytes} bytes and {self.left} are left")
        piece = self._bytes[self.at : self.at + num_bytes]
        self.at += num_bytes
        return piece

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def count(self, least_bytes: int, what: str) -> int:
        """Read how many things follow, of at least `least_bytes` each."""
        number: int = self.number("<Q", what)
        if number * least_bytes > self.left:
            raise self.fail(
                f"it claims {number} {what}, more than its remaining {self.left} bytes can hold"
            )
        self._items += number
        if self._items > _MAX_ITEMS:
            raise self.fail(f"it holds more than {_MAX_ITEMS} items")
        return number

    def string(self, what: str, limit: int | None = None) -> str:
        length: int = self.number("<Q", f"the length of {what}")
        if limit is not None and length > limit:
            raise self.fail(f"{what} claims {length} bytes, more than {limit}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8 text") from None


def _preamble(scanner: _Scanner) -> tuple[int, int, int]:
    if scanner.left < 4 or scanner.take(4, "the magic") != _MAGIC:
        raise CheckpointError(
            f"{scanner.path} is not a GGUF file: it does not begin with {_MAGIC.decode()!r}."
        )
    version: int = scanner.number("<I", "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = f"version {version}" if swapped not in _VERSIONS else "the big-endian kind"
        raise CheckpointError(
            f"{scanner.path} is a GGUF file of {kind}; versions 2 and 3, little-endian, can be read."
        )
    num_tensors = scanner.count(_LEAST_TENSOR_BYTES, "tensors")
    return version, num_tensors, scanner.count(_LEAST_PAIR_BYTES, "metadata pairs")


def _metadata(scanner: _Scanner, num_pairs: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(num_pairs):
        key = scanner.string("a metadata key", _MAX_NAME_BYTES)
        if key in metadata:
            raise scanner.fail(f"the metadata key {key!r} comes twice")
        kind = scanner.number("<I", f"the type of {key!r}")
        metadata[key] = _value(scanner, kind, repr(key), 0)
    return metadata


def _value(scanner: _Scanner, kind: int, what: str, depth: int) -> Value:
    if kind in _SCALARS:
        number: int | float = scanner.number(_SCALARS[kind], what)
        return number
    if kind == _BOOL:
        return scanner.number("B", what) != 0
    if kind == _STRING:
        return scanner.string(what)
    if kind == _ARRAY and depth < _MAX_NESTING:
        return _array(scanner, what, depth + 1)
    raise scanner.fail(
        f"{what} is of an unknown type {kind}" if kind != _ARRAY else f"{what} nests too deep"
    )


def _array(scanner: _Scanner, what: str, depth: int) -> list[Any]:
    kind = scanner.number("<I", f"the item type of {what}")
    layout = "?" if kind == _BOOL else _SCALARS.get(kind)
    if layout is None:
        least_bytes = 12 if kind == _ARRAY else 8
        length = scanner.count(least_bytes, f"items of {what}")
        return [_value(scanner, kind, f"an item of {what}", depth) for _ in range(length)]
    item_bytes = struct.calcsize(layout)
    length = scanner.count(item_bytes, f"items of {what}")
    return np.frombuffer(scanner.take(length * item_bytes, what), layout).tolist()


def _alignment(path: Path, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or alignment < 1
        or alignment & (alignment - 1)
        or alignment > 1 << 20
    ):
        raise CheckpointError(
            f"{path} is damaged: general.alignment is {alignment!r}, not a power of two."
        )
    return alignment


def _tensors(scanner: _Scanner, num_tensors: int, alignment: int) -> dict[str, GGUFTensor]:
    """Read the tensor table; starts become positions in the file, once the table's own end is known."""
    rows = [_tensor_row(scanner) for _ in range(num_tensors)]
    data_start = -(-scanner.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, number_format, offset in rows:
        if name in tensors:
            raise scanner.fail(f"the tensor {name!r} comes twice")
        if offset % alignment:
            raise scanner.fail(
                f"the tensor {name!r} starts at {offset}, not a multiple of {alignment}"
            )
        tensor = GGUFTensor(name, shape, number_format, data_start + offset)
        if tensor.start + tensor.num_bytes > scanner.at + scanner.left:
            raise scanner.fail(
                f"the tensor {name!r} ends at byte {tensor.start + tensor.num_bytes}, behind the end of the file"
            )
        tensors[name] = tensor
    _check_apart(scanner, tensors)
    return tensors


def _tensor_row(scanner: _Scanner) -> tuple[str, tuple[int, ...], Format, int]:
    name = scanner.string("a tensor name", _MAX_NAME_BYTES)
    num_dimensions = scanner.number("<I", f"the shape of {name!r}")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise scanner.fail(f"the tensor {name!r} claims {num_dimensions} dimensions")
    shape = tuple(scanner.number("<Q", f"the shape of {name!r}") for _ in range(num_dimensions))[
        ::-1
    ]
    code = scanner.number("<I", f"the format of {name!r}")
    offset = scanner.number("<Q", f"the offset of {name!r}")
    if code not in FORMATS:
        known = ", ".join(row.name for row in FORMATS.values())
        raise CheckpointError(
            f"{scanner.path}: the tensor {name!r} is in the number format {UNREAD_FORMATS.get(code, code)}, "
            f"which is not read here; take a file in one of {known}."
        )
    if min(shape) < 1 or math.prod(shape) > 1 << 62 or shape[-1] % FORMATS[code].block_values:
        raise scanner.fail(
            f"the tensor {name!r} has the impossible shape {shape} for {FORMATS[code].name}"
        )
    return name, shape, FORMATS[code], offset


def _check_apart(scanner: _Scanner, tensors: dict[str, GGUFTensor]) -> None:
    end, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise scanner.fail(f"the tensors {before!r} and {tensor.name!r} overlap")
        end, before = tensor.start + tensor.num_bytes, tensor.name
