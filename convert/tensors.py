"""A tensor on its way through a conversion: one record, from the file it is in to the file it gets.

    in_file("q_proj.weight", "BF16", (64, 64), file, ...)    the reader: what a file claims
      .renamed("model.layers.0.self_attn.q_proj.weight")     the names
      .cast("F32").quantised(...)                            the base model's plan
      .make()                                                the writer: now the bits are read

Every change is noted in `operations`, for people and for the writer, which copies bytes from file to
file where there was none. At most one tensor is in memory at a time, so a checkpoint larger than
memory converts. What is computed is checked to be finite, once, where it leaves (`make`).
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CheckpointError, shown
from ..weights.tensorfile import (
    FLOATS,
    NUMPY_TYPES,
    TensorSpec,
    cast_bits,
    dtype_name,
    is_finite,
    read_exactly,
    to_bits,
    to_mlx,
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Tensor(TensorSpec):
    """A tensor: `read` gives its bits (bfloat16 as uint16), shape and dtype as named.

    sources: the tensors it is made of, (file, name in it); none where mlx-lm's `sanitize` computed it.
    operations: what is done to them, in order.
    start: where its bytes lie in the one file, in order and unchanged; None if they do not.
    parts: what is written in its place where it is quantised: weight, scales and perhaps biases.
    """

    sources: tuple[tuple[Path, str], ...]
    read: Callable[[], np.ndarray] = field(compare=False, repr=False)
    operations: tuple[str, ...] = ()
    start: int | None = None
    parts: tuple[TensorSpec, ...] = ()
    quantise: Callable[[np.ndarray], list[np.ndarray]] | None = field(default=None, compare=False)

    @staticmethod
    def in_file(
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        path: Path,
        read: Callable[[], np.ndarray],
        start: int | None = None,
        operations: tuple[str, ...] = (),
    ) -> Tensor:
        """Return a tensor of a file; float64, which MLX has not, becomes float32."""

        def stable() -> np.ndarray:
            with readable(path):
                return read()

        tensor = Tensor(name, dtype, shape, ((path, name),), stable, operations, start)
        return tensor.cast("F32") if dtype == "F64" else tensor

    @staticmethod
    def of_mlx(name: str, value: mx.array) -> Tensor:
        """Return a tensor that MLX computes when it is read."""
        shape = tuple(value.shape)
        return Tensor(name, dtype_name(value.dtype), shape, (), lambda: to_bits(value), ("mlx-lm",))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What is written, in order."""
        return self.parts or (self,)

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        return " + ".join(f"{path.name}: {name}" for path, name in self.sources) or "mlx-lm"

    def make(self) -> list[np.ndarray]:
        """Return the bits of `outputs`.

        Raises:
            CheckpointError: the file cannot be read any more, or what was computed is not finite.
        """
        bits = self.read()
        if self.operations and not is_finite(bits, self.dtype):
            names = self.origin if self.sources else self.name
            raise CheckpointError(
                f"{shown(names)} holds NaN or infinite values as {self.dtype}; the training diverged, "
                f"the file is damaged, or the values are beyond the range of {self.dtype}: give "
                "another --dtype."
            )
        return self.quantise(bits) if self.quantise else [bits]

    def read_row(self, row: int) -> np.ndarray:
        """Read one row of the first axis, where `start` is known."""
        assert self.start is not None
        path = self.sources[0][0]
        bits = np.empty(self.shape[1:], NUMPY_TYPES[self.dtype])
        with readable(path), path.open("rb", buffering=0) as file:
            read_exactly(file, self.start + row * bits.nbytes, bits)
        return bits

    def renamed(self, name: str) -> Tensor:
        """Return the same tensor under another name."""
        return dataclasses.replace(self, name=name)

    def transposed(self) -> Tensor:
        """Return (a, b) as (b, a)."""
        read, shape = self.read, self.shape[::-1]
        return self._after("transpose", lambda: np.ascontiguousarray(read().T), shape=shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of the first axis."""
        read, shape = self.read, (stop - start, *self.shape[1:])
        return self._after("split", lambda: read()[start:stop], shape=shape)

    def cast(self, dtype: str) -> Tensor:
        """Return a float tensor in another float type, rounded as PyTorch does."""
        if dtype == self.dtype:
            return self
        read, own = self.read, self.dtype
        return self._after(f"{own} to {dtype}", lambda: cast_bits(read(), own, dtype), dtype=dtype)

    def offsets_to_ids(self) -> Tensor:
        """Return offsets d (n,), integers, as the ids i + d of their places i, I32; -1 beyond its range."""
        read, size = self.read, self.shape[0]
        ids = lambda: _in_range(read() + np.arange(size))  # noqa: E731
        return self._after("offsets to ids", ids, dtype="I32")

    def merged(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return W + scale · B·A as float32, of the LoRA pair a (in, r) and b (r, out)."""
        weight, a, b = self.cast("F32"), a.cast("F32"), b.cast("F32")
        merge = lambda: weight.read() + np.float32(scale) * (a.read() @ b.read()).T  # noqa: E731
        return weight._after("merge LoRA", merge)

    def quantised(self, parts: tuple[TensorSpec, ...], layer: nn.Module) -> Tensor:
        """Return a tensor that is written as `parts`, in the bits, groups and mode of a layer."""
        dtype, settings = self.dtype, (layer.group_size, layer.bits, layer.mode)

        def quantise(bits: np.ndarray) -> list[np.ndarray]:
            group_size, bits_each, mode = settings
            made = mx.quantize(to_mlx(bits, dtype), group_size, bits_each, mode=mode)
            mx.eval(made)
            return [to_bits(part) for part in made]

        made = self._after(f"{layer.mode} {layer.bits} bit", self.read)
        return dataclasses.replace(made, parts=parts, quantise=quantise)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    def _after(
        self,
        operation: str,
        read: Callable[[], np.ndarray],
        shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
    ) -> Tensor:
        return dataclasses.replace(
            self,
            read=read,
            operations=(*self.operations, operation),
            start=None,
            shape=self.shape if shape is None else shape,
            dtype=dtype or self.dtype,
        )


def _in_range(ids: np.ndarray) -> np.ndarray:
    """Return ids as int32, those that it does not have as -1."""
    return np.where((ids < 0) | (ids >= 1 << 31), -1, ids).astype(np.int32)


def joined(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one dtype and width as one, rows below rows."""
    first = tensors[0]
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    sources = tuple(source for tensor in tensors for source in tensor.sources)
    operations = tuple(dict.fromkeys(each for tensor in tensors for each in tensor.operations))
    read = lambda: np.concatenate([tensor.read() for tensor in tensors])  # noqa: E731
    return Tensor(name, first.dtype, shape, sources, read, (*operations, "join"))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn a file that cannot be read any more into one sentence."""
    try:
        yield
    except (EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename and Path(error.filename) != path:
            raise
        if getattr(error, "errno", None) in _NO_ROOM:  # it was copied to a place without
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path} could not be read while it was converted ({reason}); "
            "do not change it meanwhile, and try again."
        ) from None
