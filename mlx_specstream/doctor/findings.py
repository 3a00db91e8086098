"""What is known to be wrong or limited in a combination of chip, system and versions.

Each rule is a function of a machine's description alone, so a Mac can be diagnosed from anywhere.
Sources are issues and pull requests of MLX and of projects that build on it; nothing of it was
reproduced by this project, which has not run on a Mac.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..machine import BLAS_ADVICE, REFERENCE_BLAS, TF32, Machine
from . import mac
from .finding import Finding, advice, fact, older, problem

MIN_PYTHON, MIN_MLX, MIN_MLX_LM = "3.10", "0.31.2", "0.31.3"


def findings(machine: Machine) -> list[Finding]:
    """Return all that is known of a machine, problems first."""
    found = [finding for rule in RULES for finding in rule(machine)]
    order = ("problem", "advice", "fact")
    return sorted(found, key=lambda finding: order.index(finding.level))


def _other(m: Machine) -> Iterator[Finding]:
    if m.system in ("Darwin", "Linux"):
        return
    yield problem(
        f"{m.system or 'this system'} is not supported",
        "MLX runs on macOS and Linux",
        "use a Mac, or Linux (under Windows: WSL)",
    )


def _installation(m: Machine) -> Iterator[Finding]:
    if m.mlx_error:
        yield problem(
            f"MLX cannot be imported: {m.mlx_error}",
            "nothing runs without it",
            "install it again: pip install --force-reinstall --no-cache-dir mlx",
            "https://github.com/ml-explore/mlx/issues/200",
        )
    for name, have, want in (
        ("Python", m.python, MIN_PYTHON),
        ("MLX", m.mlx, MIN_MLX),
        ("mlx-lm", m.mlx_lm, MIN_MLX_LM),
    ):
        if older(have, want):
            yield problem(
                f"{name} {have} is older than {want}",
                "the tests do not pass with it; older MLX reads truncated weights in silence",
                f"install {name} {want} or newer"
                + ("" if name == "Python" else f": pip install -U {name.lower()}"),
            )
    if not m.mlx_lm:
        yield problem(
            "mlx-lm is not installed",
            "models are loaded with it",
            "pip install mlx-lm",
        )


def _linux(m: Machine) -> Iterator[Finding]:
    if m.system == "Darwin" or not m.backend:
        return
    if m.backend == "cpu":
        if m.nvidia:
            yield advice(
                "there is an NVIDIA GPU that MLX does not use",
                "the CPU build is installed",
                "pip install 'mlx-specstream[cuda]', then pip install --force-reinstall "
                "--no-deps mlx-cuda-12 (both builds bring the same file; the last one counts)",
            )
        if m.blas == REFERENCE_BLAS:
            yield advice(
                "MLX computes with the reference BLAS, the slow one",
                "every row costs the full price, so that speculation cannot gain",
                BLAS_ADVICE,
            )
        if m.blas_error:
            yield advice(
                m.blas_error,
                f"MLX computes with {m.blas or 'its own library'} instead",
                "name a file with cblas_sgemm and 32-bit sizes, such as libopenblas.so.0, in "
                "SPECSTREAM_BLAS, or leave that unset",
            )
        yield fact(
            "16-bit and quantised weights are slow on the CPU, in proportion to rows",
            "MLX has no fast kernels for them there: 4-bit with bfloat16 is nine times slower than float32",
            "measure and compare in float32; quantised models are for trying things out",
            "https://github.com/ml-explore/mlx/issues/2037",
        )
    else:
        yield fact(
            "4-bit weights are read again for every row up to 7; from 8 rows on they are shared",
            "MLX's CUDA kernels for few rows work row by row, so 8 rows can cost less than 7",
            "leave the tree to --tree auto",
            "https://github.com/lablup/mlxcel/issues/740",
        )


def _precision(m: Machine) -> Iterator[Finding]:
    if m.rounds_float32:
        yield fact(
            "float32 is not quite float32 here: passes of several rows take factors at 10 bits (TF32)",
            "MLX turns this on for neural accelerators and tensor cores; passes of one row stay exact, "
            "so plain and speculative answers of float32 models can part where two tokens are nearly "
            "as likely",
            f"nothing for 16 and 4 bits; for exact float32 set {TF32}=0 (verify and demo do)",
            "https://github.com/ml-explore/mlx/issues/3534",
        )


RULES: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    _other,
    _installation,
    mac.system,
    mac.versions,
    mac.rows,
    mac.memory,
    _precision,
    _linux,
)
