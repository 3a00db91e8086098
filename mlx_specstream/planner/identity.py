"""What a cost curve holds for: if any of it changes, costs are measured anew."""

from __future__ import annotations

import os
import zlib
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ModelError
from ..loading.load import StreamModel
from ..machine import Machine, ranks
from ..weights.fingerprint import fingerprint

# The folders a step is made of: when their sources change, so may its cost.
_ENGINE = ("model", "speculation")
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def identity(model: StreamModel) -> dict[str, object]:
    """Return machine, software, model and streams in the form of JSON.

    The model must have streams.
    """
    assert model.streams is not None
    machine = this_machine()
    return {
        "chip": machine.chip,
        "backend": machine.backend,
        "gpu": machine.gpu,
        "blas": machine.blas,
        "mlx": machine.mlx,
        "threads": _threads(),
        "processes": ranks.count(),
        "engine": _engine(),
        "model": _fingerprint(model.model),
        "bits": weight_bits(model.model),
        "bytes": _bytes(model.model),
        "dtype": str(model.backbone.dtype).rpartition(".")[2],
        "streams": model.streams.config.to_dict(),
    }


def _bytes(model: nn.Module) -> int:
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return sum(array.nbytes for _, array in weights)


def weight_bits(model: nn.Module) -> int:
    """Return the bits of a model's linear weights, of the first quantised one if there is any."""
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            return int(module.bits)
    for _, module in model.named_modules():
        if isinstance(module, nn.Linear):
            return 8 * int(module.weight.dtype.size)
    return 32


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """Return what is known of this machine; it is asked once."""
    return Machine.read()


@lru_cache(maxsize=1)
def _engine() -> str:
    """Return a checksum of the sources that a step runs through."""
    here, sum_ = Path(__file__).parent.parent, 0
    for name in _ENGINE:
        for path in sorted((here / name).rglob("*.py")):
            sum_ = zlib.crc32(path.read_bytes(), sum_)
    return f"{sum_:08x}"


def _threads() -> str:
    """Return the cores this process may use and the limits set for matrix libraries."""
    try:
        cores = len(os.sched_getaffinity(0))  # type: ignore[attr-defined, unused-ignore]
    except AttributeError:  # macOS
        cores = os.cpu_count() or 0
    limits = [f"{name}={os.environ[name]}" for name in _THREADS if os.environ.get(name)]
    return " ".join([str(cores), str(mx.default_device()), *limits])


def _fingerprint(model: nn.Module) -> str:
    try:
        return fingerprint(model)
    except ModelError:
        return type(model).__module__
