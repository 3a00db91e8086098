"""Writing safetensors files tensor by tensor, and from file to file without a copy in memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from io import RawIOBase
from pathlib import Path
from types import TracebackType

import numpy as np

from .bits import NUMPY_TYPES, TensorSpec


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
