"""safetensors files, read strictly and written as a stream; knows bytes and shapes, not models.

    | 8 bytes: n | n bytes of JSON: name -> dtype, shape, [start, stop) | tensor bytes, in a row |

MLX's own loader trusts that header. Here every claim in it is checked against the file before a
byte of a tensor is read: sizes match dtype x shape, ranges lie inside the file and follow each
other without overlap or hole, no name comes twice. A tensor is held as its *bits*: a NumPy array,
with bfloat16 as uint16, since NumPy has no such type.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType

import mlx.core as mx
import numpy as np

from mlx_specstream.errors import SpecStreamError

MAX_HEADER_BYTES = 32 << 20
MAX_DIMENSIONS = 8

NUMPY_TYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
"""safetensors dtype -> the NumPy type of its bits."""

MLX_TYPES: dict[str, mx.Dtype] = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "I64": mx.int64, "I32": mx.int32,
    "I16": mx.int16, "I8": mx.int8, "U64": mx.uint64, "U32": mx.uint32, "U16": mx.uint16,
    "U8": mx.uint8, "BOOL": mx.bool_,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
_NAMES = {dtype: name for name, dtype in MLX_TYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is called and how it is laid out."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY_TYPES[self.dtype].itemsize


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
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise error(
                    f"{path} is not a safetensors file or is cut short (header of {length} bytes);"
                    " get it again."
                )
            text = file.read(length)
    except OSError as failure:
        raise error(
            f"{path} cannot be read ({failure.strerror or failure}); check the path and its"
            " permissions."
        ) from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
        metadata = _metadata(header.pop("__metadata__", None) or {})  # MLX writes null
        entries = [_entry(name, value, 8 + length) for name, value in header.items()]
        _check_layout(entries, 8 + length, size)
    except (ValueError, RecursionError) as failure:
        reason = "it nests too deeply" if isinstance(failure, RecursionError) else failure
        raise error(
            f"{path} has a damaged safetensors header: {reason}; get the file again."
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


def shown(value: object, limit: int = 120) -> str:
    """Return a value from a file as an error message may show it: quoted, one line, not endless."""
    text = (
        ascii(value)
        if not isinstance(value, int) or abs(value) < 1 << 200
        else "a number far too large"
    )
    return text if len(text) <= limit else text[: limit - 3] + "..."


def brief(error: Exception, limit: int = 500) -> str:
    """Return what an error says, shortened: values from a file may be endless."""
    text = str(error)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def to_mlx(bits: np.ndarray, dtype: str) -> mx.array:
    """Return a tensor's bits as an MLX array of the same shape; float64 becomes float32."""
    if dtype == "F64":
        return mx.array(bits.astype(np.float32))
    return mx.array(bits).view(mx.bfloat16) if dtype == "BF16" else mx.array(bits)


def to_bits(tensor: mx.array) -> np.ndarray:
    """Return an MLX array's bits, same shape; evaluates it."""
    return np.array(tensor.view(mx.uint16) if tensor.dtype == mx.bfloat16 else tensor, order="C")


def cast_bits(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """Return a float tensor's bits in another float type, rounded to nearest even as PyTorch does.

    In NumPy, so that a conversion gives the same bits on every device.

        1.005859375  F32 0x3f80c000  ->  BF16 0x3f81
    """
    if source == target:
        return bits
    wide = _widened(bits, source)
    if target != "BF16":
        with np.errstate(over="ignore"):
            return wide.astype(NUMPY_TYPES[target])
    raw = np.ascontiguousarray(wide, np.float32).view(np.uint32)
    rounded = (raw + (((raw >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16)


def _widened(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits if dtype == "F64" else bits.astype(np.float32)


def dtype_name(dtype: mx.Dtype) -> str:
    """Return the safetensors name of an MLX dtype, `mx.bfloat16` -> "BF16"."""
    return _NAMES[dtype]


class TensorWriter:
    """Write a safetensors file tensor by tensor, so that it never has to fit in memory.

    The header is written first, from the specs; `write` then takes the tensors in the same order.
    """

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], metadata: dict[str, str] | None = None
    ) -> None:
        self._file = path.open("xb", buffering=0)
        self._specs = list(specs)
        self._written = 0
        self._copies_in_kernel = hasattr(os, "copy_file_range")
        self._buffer = bytearray(4 << 20)
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        position = 0
        for spec in self._specs:
            offsets = [position, position + spec.nbytes]
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": offsets,
            }
            position = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._write_all(memoryview(struct.pack("<Q", len(text)) + text))

    def write(self, bits: np.ndarray) -> None:
        """Append the next tensor; shape and dtype must be those announced."""
        spec = self._specs[self._written]
        assert bits.shape == spec.shape, (spec, bits.shape)
        assert bits.dtype == NUMPY_TYPES[spec.dtype], (spec, bits.dtype)
        self._write_all(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
        self._written += 1

    def copy(self, path: Path, start: int) -> None:
        """Append the next tensor from bytes that lie in `path`; inside the kernel where possible.

        Raises:
            EOFError: the file has become shorter than it was.
        """
        left = self._specs[self._written].nbytes
        with path.open("rb", buffering=0) as source:
            while left:
                count = self._copy_some(source, start, left)
                if count == 0:
                    raise EOFError("the file ends early")
                start, left = start + count, left - count
        self._written += 1

    def _copy_some(self, source: RawIOBase, start: int, left: int) -> int:
        """Copy some of the next `left` bytes and return how many."""
        if self._copies_in_kernel:
            try:
                return os.copy_file_range(source.fileno(), self._file.fileno(), left, start)
            except (AttributeError, OSError):  # not Linux, or not between these file systems
                self._copies_in_kernel = False
        source.seek(start)
        count = min(source.readinto(self._buffer) or 0, left)
        self._write_all(memoryview(self._buffer)[:count])
        return count

    def _write_all(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += self._file.write(data[done:]) or 0

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        assert kind is not None or self._written == len(self._specs), (
            "not every announced tensor was written"
        )
