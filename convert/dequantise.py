"""Weights that MLX has quantised, as floats again, worked out without MLX: the proof's side.

    affine          w = scale · q + bias, in groups of a row
    mxfp4, mxfp8    w = 2^(scale − 127) · q, q a float of 4 or 8 bits
    nvfp4           w = scale · q, both floats: the scale of 8 bits, q of 4

A row's numbers stand in its bytes one behind the other, lowest bit first, whatever their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # sign apart: the highest bit


def settings_of(quantization: Mapping[str, Any], module: str) -> tuple[int, str]:
    """Return the bits and the mode of a module by a config's `quantization`."""
    own = quantization.get(module)
    settings = {**quantization, **(own if isinstance(own, dict) else {})}
    return settings["bits"], settings.get("mode", "affine")


def dequantised(
    weight: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor | None, bits: int, mode: str
) -> torch.Tensor:
    """Return (out, in) float32 for a packed weight (out, in·bits/32) of 32-bit words.

    scales, biases: (out, groups), biases in the affine mode alone.
    """
    numbers = _unpacked(weight.view(torch.uint8).numpy(), bits)
    if mode == "affine":
        assert biases is not None
        q, scale = torch.from_numpy(numbers).float(), scales.float()
    else:
        q = _float8(numbers) if bits == 8 else _float4(numbers)
        is_float = mode == "nvfp4"
        scale = _float8(scales.numpy()) if is_float else torch.exp2(scales.float() - 127)
    groups = q.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]
    if biases is not None:
        groups = groups + biases.float()[..., None]
    return groups.flatten(-2)


def _unpacked(row_bytes: np.ndarray, bits: int) -> np.ndarray:
    """Return the numbers of `bits` bits in rows of bytes, uint8."""
    single = np.unpackbits(row_bytes, axis=-1, bitorder="little")
    return np.packbits(single.reshape(*row_bytes.shape[:-1], -1, bits), axis=-1, bitorder="little")[
        ..., 0
    ]


def _float4(numbers: np.ndarray) -> torch.Tensor:
    """Return floats of 2 bits of exponent and 1 of mantissa."""
    return torch.from_numpy(np.where(numbers & 8, -1, 1).astype(np.float32) * _FLOAT4[numbers & 7])


def _float8(numbers: np.ndarray) -> torch.Tensor:
    """Return floats of 4 bits of exponent and 3 of mantissa."""
    return torch.from_numpy(numbers).view(torch.float8_e4m3fn).float()
