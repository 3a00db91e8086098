"""The machine a figure was taken on: chip, memory, system, MLX with its back end, and versions.

Every probe may fail on an odd machine; what cannot be found out is left empty, never an error.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from . import blas

T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """What computes, as JSON can hold it; an empty string or 0 is something not known.

    system: `Darwin`, `Linux` ... arch: of this Python's process. translated: it runs under
    Rosetta. backend: `metal`, `cuda`, `cpu`, or empty if MLX cannot be imported (`mlx_error` says
    why). gpu: Metal's architecture, as `applegpu_g16s`, or the CUDA device's name.
    working_set_bytes: what Metal recommends to use of the memory, or the CUDA device's memory.
    blas: matrix library of the CPU back end; blas_error: why it is not the one asked for.
    nvidia: there is a driver for NVIDIA GPUs. low_power: a Mac saves energy and is slower for it.
    tf32: MLX may take float32 factors at 10 bits (its default), where the GPU can.
    """

    system: str = ""
    os_version: str = ""
    arch: str = ""
    translated: bool = False
    chip: str = ""
    cores: int = 0
    memory_bytes: int = 0
    backend: str = ""
    gpu: str = ""
    working_set_bytes: int = 0
    blas: str = ""
    blas_error: str = ""
    nvidia: bool = False
    low_power: bool = False
    tf32: bool = True
    python: str = ""
    conda: bool = False
    mlx: str = ""
    mlx_lm: str = ""
    mlx_specstream: str = ""
    mlx_error: str = ""

    @classmethod
    def read(cls) -> Machine:
        """Describe this machine."""
        from .. import __version__

        system = platform.system()
        mac = system == "Darwin"
        found = _mlx()
        memory = _try(lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0)
        return cls(
            system=system,
            os_version=(_try(lambda: platform.mac_ver()[0], "") if mac else platform.release()),
            arch=platform.machine(),
            translated=mac and _sysctl("sysctl.proc_translated") == "1",
            chip=_chip(mac),
            cores=os.cpu_count() or 0,
            memory_bytes=memory,
            backend=found.backend,
            gpu=found.gpu,
            working_set_bytes=found.working_set_bytes,
            blas=_blas(mac) if found.backend == "cpu" else "",
            blas_error=names_of(blas.state.problem) if found.backend == "cpu" else "",
            nvidia=_try(lambda: Path("/proc/driver/nvidia/version").exists(), False),
            low_power=mac and bool(re.search(r"lowpowermode\s+1", _output("/usr/bin/pmset", "-g"))),
            tf32=_tf32(),
            python=platform.python_version(),
            conda=(Path(sys.prefix) / "conda-meta").is_dir(),
            mlx=_version("mlx"),
            mlx_lm=_version("mlx-lm"),
            mlx_specstream=__version__,
            mlx_error=names_of(found.error),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Machine:
        """Make one from its JSON form; fields that are not known are left out."""
        known = {field.name: field for field in fields(cls)}
        kept = {}
        for name, value in values.items():
            default = getattr(cls, name) if name in known else None
            if default is not None and type(value) is type(default):
                kept[name] = value
        return cls(**kept)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return asdict(self)

    @property
    def gpu_generation(self) -> int:
        """Return Apple's GPU generation: 13 for M1 up to 17 for M5; 0 for others and virtual ones."""
        match = re.fullmatch(r"applegpu_g(\d+)[a-z]?", self.gpu)
        return int(match[1]) if match else 0

    @property
    def has_neural_accelerators(self) -> bool:
        """Tell whether the GPU has matrix units: from M5 on; of the phones' chips from A19 on."""
        return self.gpu_generation >= (18 if self.gpu.endswith("p") else 17)

    @property
    def rounds_float32(self) -> bool:
        """Tell whether float32 products of two and more rows take their factors at 10 bits (TF32).

        NVIDIA's tensor cores do, and the neural accelerators of M5 and later from macOS 26.2 on; a
        product of one row stays exact. So plain and verifying passes differ, though not by a fault.
        """
        release = tuple(int(part) for part in re.findall(r"\d+", self.os_version)[:2])
        apple = self.backend == "metal" and self.has_neural_accelerators and release >= (26, 2)
        return self.tf32 and (apple or self.backend == "cuda")

    @property
    def summary(self) -> str:
        """Return system, chip and what computes, in a few words."""
        name = "macOS" if self.system == "Darwin" else self.system or "an unknown system"
        if self.backend in ("metal", "cuda"):
            return f"{name}, {self.chip if self.backend == 'metal' else self.gpu or 'GPU'}"
        return f"{name} on the CPU, {self.cores} cores, {self.blas or 'unknown BLAS'}"

    @property
    def versions(self) -> str:
        """Return the versions that decide about speed, in a line."""
        return f"MLX {self.mlx or '?'}, mlx-lm {self.mlx_lm or '?'}, Python {self.python or '?'}"


TF32 = "MLX_ENABLE_TF32"
"""MLX's environment variable: 0 keeps float32 products exact. MLX reads it at its first product."""


def keep_float32_exact() -> None:
    """Have this process compute float32 products exactly, unless the user said otherwise.

    To be called before MLX computes anything.
    """
    os.environ.setdefault(TF32, "0")


def rounds_float32() -> bool:
    """Tell whether this process rounds float32 factors to 10 bits on MLX's default device."""
    if not _tf32():
        return False
    found, mac = _mlx(), platform.system() == "Darwin"
    release = _try(lambda: platform.mac_ver()[0], "") if mac else ""
    here = Machine(backend=found.backend, gpu=found.gpu, os_version=release, tf32=True)
    return here.rounds_float32


def _tf32() -> bool:
    """Read the variable as MLX does: the number it begins with, 1 if it is not set."""
    number = re.match(r"\s*[+-]?0*(\d*)", os.environ.get(TF32, "1"))
    return bool(number and number[1])


@dataclass(frozen=True)
class _Found:
    """What MLX says of itself."""

    backend: str = ""
    gpu: str = ""
    working_set_bytes: int = 0
    error: str = ""


def _mlx() -> _Found:
    try:
        import mlx.core as mx

        on_gpu = "gpu" in str(mx.default_device()).lower()
        nothing: dict[str, str | int] = {}
        # Older versions have it for Metal alone.
        info = _try(mx.device_info, nothing) or _try(mx.metal.device_info, nothing)
        metal = _try(lambda: bool(mx.metal.is_available()), False)
    except Exception as error:  # a damaged or foreign installation raises anything
        return _Found(error=" ".join(str(error).split())[:300] or type(error).__name__)
    if not on_gpu:
        return _Found("cpu")
    if metal:
        gpu, size = info.get("architecture", ""), info.get("max_recommended_working_set_size", 0)
    else:
        gpu, size = (
            info.get("device_name", ""),
            info.get("total_memory", info.get("memory_size", 0)),
        )
    return _Found("metal" if metal else "cuda", str(gpu), size if isinstance(size, int) else 0)


def _chip(mac: bool) -> str:
    if mac:
        return _sysctl("machdep.cpu.brand_string")
    text = _try(lambda: Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), "")
    match = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return match[1].strip() if match else platform.processor()


def _blas(mac: bool) -> str:
    """Name the matrix library that MLX's CPU build computes with."""
    return "Accelerate" if mac else blas.state.name


def names_of(text: str) -> str:
    """Return a message with the names of files alone: folders are nobody else's business."""
    return re.sub(r"(?<![\w:/])[~.]{0,2}/(?:[^\s/'\",;:)]+/)*(?=[^\s/'\",;:)])", "", text)


def _sysctl(name: str) -> str:
    return _output("/usr/sbin/sysctl", "-n", name).strip()


def _output(*words: str) -> str:
    def read() -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout

    return _try(read, "")


def _version(package: str) -> str:
    from importlib import metadata

    return _try(lambda: metadata.version(package), "")


def _try(probe: Callable[[], T], otherwise: T) -> T:
    try:
        return probe()
    except Exception:  # a probe that fails finds nothing
        return otherwise
