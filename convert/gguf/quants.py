"""The number formats of GGUF tensors: bytes of blocks to float32, vectorised over blocks.

A tensor's last axis is cut in blocks of 1, 32 or 256 values that share scales. Results are those of the format's
definition in float32, one rounding per operation, so that independent readers agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_CHUNK_VALUES = 1 << 20
"""Values decoded at a time: temporaries stay in the cache and small beside the result."""


@dataclass(frozen=True)
class Format:
    """One number format: its code and name in files, the size of a block, and how a block reads."""

    code: int
    name: str
    block_values: int
    block_bytes: int
    decode: Callable[[Bytes], Floats]
    """(n, block_bytes) uint8 -> (n, block_values) float32."""

    def num_bytes(self, num_values: int) -> int:
        """Return the bytes that `num_values`, a multiple of the block, take."""
        return num_values // self.block_values * self.block_bytes


def dequantize(raw: Bytes, number_format: Format, shape: tuple[int, ...]) -> Floats:
    """Return the float32 array of `shape` that the bytes `raw` stand for.

    raw: (num_bytes,) uint8, exactly the tensor's bytes.
    """
    blocks = raw.reshape(-1, number_format.block_bytes)
    values = np.empty((len(blocks), number_format.block_values), np.float32)
    step = max(1, _CHUNK_VALUES // number_format.block_values)
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # a damaged scale gives inf or NaN, told by the caller
        for start in range(0, len(blocks), step):
            chunk = np.ascontiguousarray(blocks[start : start + step])
            values[start : start + step] = number_format.decode(chunk)
    return values.reshape(shape)


def _unpack(packed: Bytes, bits: int) -> Bytes:
    """Split each byte in its fields of `bits`, lowest first: (..., w) -> (..., 8 // bits, w).

    All lowest fields come first, then all second ones: 4 bits of [0xA1, 0xB2] are [[1, 2], [0xA, 0xB]].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _half(blocks: Bytes, at: int) -> Floats:
    """Read the float16 at byte `at` of every block: (n, b) -> (n, 1)."""
    pair = np.ascontiguousarray(blocks[:, at : at + 2])
    return pair.view("<f2").astype(np.float32)


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


# Blocks of 32. `d` is the scale, `m` the minimum; 4-bit values 0-15 sit in the low nibbles, 16-31 in the high ones;
# the fifth bit of value i is bit i of a 32-bit word.


def _fifth_bits(word: Bytes) -> Bytes:
    return _unpack(word[:, :, None], 1).reshape(len(word), 32)


def _nibbles(packed: Bytes) -> Bytes:
    return _unpack(packed, 4).reshape(len(packed), 32)


def _q4_0(blocks: Bytes) -> Floats:  # d | 16 nibble pairs
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:  # d | m | 16 nibble pairs
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:  # d | 4 bytes of fifth bits | 16 nibble pairs
    values = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]) << np.uint8(4)
    return _half(blocks, 0) * (values.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:  # d | m | 4 bytes of fifth bits | 16 nibble pairs
    values = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]) << np.uint8(4)
    return _half(blocks, 0) * values.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:  # d | 32 signed bytes
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


# Blocks of 256 ("K-quants"): sub-blocks of 16 or 32 have small integer scales of their own, times the block's.


def _scaled(
    values: Bytes | NDArray[np.int8], scale: Floats, minimum: Floats | None = None
) -> Floats:
    """Multiply sub-blocks by their scales, subtract their minima: (n, s, w), (n, s) -> (n, s * w)."""
    floats = scale[:, :, None] * values.astype(np.float32)
    if minimum is not None:
        floats = floats - minimum[:, :, None]
    return floats.reshape(len(values), -1)


def _six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Read 8 scales and 8 minima of 6 bits from 12 bytes.

    Bytes 0-3 hold scales 0-3, bytes 4-7 minima 0-3, in six bits; bytes 8-11 hold the low nibbles of scales (low) and
    minima (high) 4-7, whose top two bits are those of bytes 0-3 and 4-7.
    """
    scales, minima, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    six = np.uint8(63)
    return (
        np.concatenate([scales & six, low & np.uint8(15) | scales >> 6 << 4], axis=1),
        np.concatenate([minima & six, low >> 4 | minima >> 6 << 4], axis=1),
    )


def _q2_k(blocks: Bytes) -> Floats:  # 16 nibble pairs (scale, minimum) | 64 bytes of 2 bits | d | m
    values = _unpack(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    scale = _half(blocks, 80) * (blocks[:, :16] & np.uint8(15)).astype(np.float32)
    minimum = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    return _scaled(values, scale, minimum)


def _q3_k(
    blocks: Bytes,
) -> Floats:  # 32 bytes of third bits | 64 bytes of 2 bits | 12 of scales | d
    low = _unpack(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    high = _unpack(blocks[:, :32], 1).reshape(-1, 16, 16)
    values = (low | high << np.uint8(2)).astype(np.int8) - np.int8(4)
    nibbles = _unpack(blocks[:, 96:104], 4).reshape(-1, 16)
    pairs = _unpack(blocks[:, 104:108], 2).reshape(-1, 16)
    scales = (nibbles | pairs << np.uint8(4)).astype(np.float32) - 32
    return _scaled(values, _half(blocks, 108) * scales)


def _q4_k(blocks: Bytes) -> Floats:  # d | m | 12 bytes of scales | 128 nibble pairs
    values = _unpack(blocks[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    return _scaled(values, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q5_k(
    blocks: Bytes,
) -> Floats:  # d | m | 12 bytes of scales | 32 of fifth bits | 128 nibble pairs
    low = _unpack(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    values = low | _unpack(blocks[:, 16:48], 1) << np.uint8(4)
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    return _scaled(values, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q6_k(blocks: Bytes) -> Floats:  # 128 nibble pairs | 64 bytes of 2 bits | 16 signed scales | d
    low = _unpack(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 16, 16)
    high = _unpack(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    values = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _scaled(values, _half(blocks, 208) * scales)


def _q8_k(blocks: Bytes) -> Floats:  # d (float32) | 256 signed bytes | 16 sums, not needed here
    scale = np.ascontiguousarray(blocks[:, :4]).view("<f4")
    return scale * blocks[:, 4:260].view(np.int8).astype(np.float32)


FORMATS: dict[int, Format] = {
    row.code: row
    for row in (
        Format(0, "F32", 1, 4, _f32),
        Format(1, "F16", 1, 2, _f16),
        Format(2, "Q4_0", 32, 18, _q4_0),
        Format(3, "Q4_1", 32, 20, _q4_1),
        Format(6, "Q5_0", 32, 22, _q5_0),
        Format(7, "Q5_1", 32, 24, _q5_1),
        Format(8, "Q8_0", 32, 34, _q8_0),
        Format(10, "Q2_K", 256, 84, _q2_k),
        Format(11, "Q3_K", 256, 110, _q3_k),
        Format(12, "Q4_K", 256, 144, _q4_k),
        Format(13, "Q5_K", 256, 176, _q5_k),
        Format(14, "Q6_K", 256, 210, _q6_k),
        Format(15, "Q8_K", 256, 292, _q8_k),
        Format(30, "BF16", 1, 2, _bf16),
    )
}
"""Every format that is read, by its code in files; a new one is a row here."""

UNREAD_FORMATS = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""Names of formats that are not read, for an error a person understands."""
