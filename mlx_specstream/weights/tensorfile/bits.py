"""A tensor as its bits: a NumPy array, with bfloat16 as uint16, since NumPy has no such type."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

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


def is_finite(bits: np.ndarray, dtype: str) -> bool:
    """Say whether no value is NaN or infinite: an exponent of ones."""
    if dtype == "BF16":
        return not bool(((bits & 0x7F80) == 0x7F80).any())
    return dtype not in FLOATS or bool(np.isfinite(bits).all())


def dtype_name(dtype: mx.Dtype) -> str:
    """Return the safetensors name of an MLX dtype, `mx.bfloat16` -> "BF16"."""
    return _NAMES[dtype]
