"""One step of a conversion: a source tensor is read, reshaped, cast, quantised.

Nothing else is in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CheckpointError
from ..weights.tensorfile import TensorSpec, cast_bits, dtype_name, to_bits, to_mlx
from .names import Named
from .tensors import SourceTensor


@dataclass(frozen=True)
class Delta:
    """A LoRA product to merge into a weight: W + scale · B·A, with A (r, in) and B (out, r)."""

    a: Named
    b: Named
    scale: float


@dataclass(frozen=True)
class Step:
    """Make `outputs` (as bits, in order) from `sources` (for people to read: "file: tensor").

    `source` is None where mlx-lm's own `sanitize` computed the tensor.
    """

    outputs: tuple[TensorSpec, ...]
    sources: tuple[str, ...]
    how: str
    source: Named | None
    delta: Delta | None
    make: Callable[[], list[np.ndarray]] = field(compare=False, repr=False)

    @property
    def plain_copy(self) -> SourceTensor | None:
        """The source tensor, if its bytes can be copied from file to file as they are."""
        if self.how != "copy" or self.source is None:
            return None
        tensor = self.source.sources[0]
        return tensor if tensor.start is not None and tensor.dtype != "F64" else None

    @staticmethod
    def of(
        outputs: tuple[TensorSpec, ...],
        source: Named | mx.array,
        dtype: str,
        quantised: nn.Module | None = None,
        delta: Delta | None = None,
    ) -> Step:
        """Plan one step.

        Args:
            dtype: what the weight is cast to, before it is quantised.
            quantised: the layer whose bits, group size and mode are used; None: not quantised.
        """
        how = [] if isinstance(source, Named) else ["mlx-lm"]
        names: tuple[str, ...] = ("mlx-lm's sanitize",)
        if isinstance(source, Named):
            names = tuple(f"{each.origin.name}: {each.name}" for each in source.sources)
            how += ["transpose"] if source.transpose else []
            how += ["split"] if source.rows else []
            how += ["join"] if len(source.sources) > 1 else []
            how += [f"{plain_dtype(source)} to {dtype}"] if plain_dtype(source) != dtype else []
        how += ["merge LoRA"] if delta else []
        how += [f"{quantised.mode} {quantised.bits} bit"] if quantised else []
        make = lambda: _make(source, dtype, quantised, delta)  # noqa: E731
        named = source if isinstance(source, Named) else None
        return Step(outputs, names, ", ".join(how) or "copy", named, delta, make)


def plain_dtype(named: Named) -> str:
    """Return the dtype a tensor has without any cast; MLX has no float64 worth keeping."""
    dtype = named.sources[0].dtype
    return "F32" if dtype == "F64" else dtype


def materialise(named: Named) -> np.ndarray:
    """Read a tensor's bits, cut, joined or transposed; dtype as `plain_dtype`."""
    if len(named.sources) > 1:
        bits = np.concatenate([source.read() for source in named.sources])
    else:
        bits = named.sources[0].read()
    if named.rows:
        bits = bits[named.rows[0] : named.rows[1]]
    if named.transpose:
        bits = np.ascontiguousarray(bits.T)
    return bits.astype(np.float32) if bits.dtype == np.float64 else bits


def _make(
    source: Named | mx.array, dtype: str, quantised: nn.Module | None, delta: Delta | None
) -> list[np.ndarray]:
    if isinstance(source, Named):
        bits, own = materialise(source), plain_dtype(source)
    else:
        bits, own = to_bits(source), dtype_name(source.dtype)
    if delta is not None:
        a, b = (cast_bits(materialise(n), plain_dtype(n), "F32") for n in (delta.a, delta.b))
        bits, own = cast_bits(bits, own, "F32") + np.float32(delta.scale) * (b @ a), "F32"
    if own != dtype:
        bits = _cast(bits, own, dtype, source)
    if quantised is None:
        return [bits]
    value = to_mlx(bits, dtype)
    del bits
    parts = mx.quantize(value, quantised.group_size, quantised.bits, mode=quantised.mode)
    mx.eval(parts)
    del value
    return [to_bits(part) for part in parts]


def _cast(bits: np.ndarray, own: str, dtype: str, source: Named | mx.array) -> np.ndarray:
    cast = cast_bits(bits, own, dtype)
    if dtype == "F16" and own != "F16" and not np.isfinite(cast).all():
        name = source.name if isinstance(source, Named) else "a tensor"
        raise CheckpointError(
            f"{name} holds values beyond float16's range (65504), or no numbers; use "
            "bfloat16 or float32."
        )
    return cast
