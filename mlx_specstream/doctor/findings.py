"""What is known to be wrong or limited in a combination of chip, system and versions.

Each rule is a function of a machine's description alone, so a Mac can be diagnosed from anywhere.
Sources are issues and pull requests of MLX and of projects that build on it; nothing of it was
reproduced by this project, which has not run on a Mac.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from mlx_specstream.machine import REFERENCE_BLAS, Machine

Level = Literal["problem", "advice", "fact"]

MIN_PYTHON, MIN_MLX, MIN_MLX_LM = "3.10", "0.31.2", "0.31.3"
WIRED = "https://github.com/ml-explore/mlx-lm#large-models"


@dataclass(frozen=True)
class Finding:
    """One thing to know. problem: it will not work, or hardly; advice: it can be had better."""

    level: Level
    what: str
    why: str
    do: str
    source: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the JSON form."""
        return asdict(self)


def version(text: str) -> tuple[int, ...]:
    """Return the numbers a version begins with: `0.32.1.dev2` is (0, 32, 1); () if it has none."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def older(found: str, wanted: str) -> bool:
    """Tell whether a version is known and older than another."""
    return bool(version(found)) and version(found) < version(wanted)


def findings(machine: Machine) -> list[Finding]:
    """Return all that is known of a machine, problems first."""
    found = [finding for rule in RULES for finding in rule(machine)]
    order = ("problem", "advice", "fact")
    return sorted(found, key=lambda finding: order.index(finding.level))


def _installation(m: Machine) -> list[Finding]:
    found = []
    if m.mlx_error:
        found.append(
            Finding(
                "problem",
                f"MLX cannot be imported: {m.mlx_error}",
                "nothing runs without it",
                "install it again: pip install --force-reinstall --no-cache-dir mlx",
                "https://github.com/ml-explore/mlx/issues/200",
            )
        )
    for name, have, want in (
        ("Python", m.python, MIN_PYTHON),
        ("MLX", m.mlx, MIN_MLX),
        ("mlx-lm", m.mlx_lm, MIN_MLX_LM),
    ):
        if older(have, want):
            found.append(
                Finding(
                    "problem",
                    f"{name} {have} is older than {want}",
                    "the tests do not pass with it; older MLX reads truncated weights in silence",
                    f"install {name} {want} or newer"
                    + ("" if name == "Python" else f": pip install -U {name.lower()}"),
                )
            )
    if not m.mlx_lm:
        found.append(
            Finding(
                "problem",
                "mlx-lm is not installed",
                "models are loaded with it",
                "pip install mlx-lm",
            )
        )
    return found


def _mac_system(m: Machine) -> list[Finding]:
    if m.system != "Darwin":
        return []
    found = []
    if m.translated:
        found.append(
            Finding(
                "problem",
                "this Python runs under Rosetta, as an Intel program",
                "MLX has no Metal there, so nothing runs on the GPU",
                "install a native (arm64) Python and make the environment anew; "
                "`python -c 'import platform; print(platform.machine())'` must say arm64",
                "https://github.com/ml-explore/mlx/issues/200",
            )
        )
    elif m.arch == "x86_64":
        found.append(
            Finding(
                "problem",
                "this is a Mac with an Intel processor",
                "MLX computes on Apple silicon GPUs; on Intel there is only the CPU, if it installs",
                "use a Mac with Apple silicon",
            )
        )
    elif m.backend == "cpu":
        conda = " This environment is conda's." if m.conda else ""
        found.append(
            Finding(
                "problem",
                "MLX does not use the GPU here",
                f"it was built without Metal, or its device was set to the CPU.{conda}",
                "install the wheel: pip install --force-reinstall mlx mlx-metal",
                "https://github.com/ml-explore/mlx-examples/issues/1306",
            )
        )
    if older(m.os_version, "14.0"):
        found.append(
            Finding(
                "problem",
                f"macOS {m.os_version} is older than 14",
                "MLX is no longer built for it",
                "update macOS",
                "https://github.com/ml-explore/mlx/pull/2731",
            )
        )
    elif older(m.os_version, "15.0"):
        found.append(
            Finding(
                "advice",
                f"macOS {m.os_version} cannot keep weights in memory (wire them)",
                "models that fill most of the memory are paged out and become many times slower",
                "update to macOS 15 or newer for models over half the memory",
                WIRED,
            )
        )
    if m.low_power:
        found.append(
            Finding(
                "advice",
                "Low Power Mode is on",
                "the GPU runs slower, and measured costs are not those of normal use",
                "turn it off in System Settings, Battery",
            )
        )
    return found


def _mac_gpu(m: Machine) -> list[Finding]:
    gen, found = m.gpu_generation, []
    if not gen or m.backend != "metal":
        return []
    if gen >= 17 and version(m.os_version)[:1] == (26,) and older(m.os_version, "26.2"):
        found.append(
            Finding(
                "problem",
                f"macOS {m.os_version} on an M5 has no neural accelerators for MLX, which assumes them",
                "the wheel for macOS 26 is built for 26.2 and picks kernels this system does not have",
                "update to macOS 26.2 or newer",
                "https://github.com/ml-explore/mlx/issues/4525",
            )
        )
    elif gen >= 17 and older(m.os_version, "26.2"):
        found.append(
            Finding(
                "advice",
                "the M5's neural accelerators are not used",
                "MLX needs macOS 26.2 for them; reading prompts is slower without",
                "update to macOS 26.2 or newer",
                "https://github.com/ml-explore/mlx/pull/3622",
            )
        )
    if gen >= 15 and older(m.mlx, "0.32.0"):
        found.append(
            Finding(
                "advice",
                f"MLX {m.mlx} reads 4-bit weights once for every row",
                "verifying four rows costs twice what it costs since 0.32.0",
                "pip install -U mlx",
                "https://github.com/ml-explore/mlx/pull/3764",
            )
        )
    if gen >= 15 and older(m.mlx, "0.32.1"):
        found.append(
            Finding(
                "advice",
                f"MLX {m.mlx} is slow at a few rows in 16 bits",
                "since 0.32.1 up to five rows cost about as much as one",
                "pip install -U mlx",
                "https://github.com/ml-explore/mlx/pull/3888",
            )
        )
    if gen >= 15:
        found.append(
            Finding(
                "fact",
                "16-bit models gain most: up to 5 rows cost about as much as one, 15 at most twice",
                "4-bit weights cost about half as much again at 4 rows and 2.7 times at 8 (M4 Pro)",
                "leave the tree to --tree auto; with 4 bits expect chains, with 16 bits trees",
                "https://github.com/ml-explore/mlx/issues/3839",
            )
        )
    else:
        found += [
            Finding(
                "fact",
                "4-bit models gain little: each row up to five reads all weights again",
                "the GPUs of M1 and M2 lack the kernels that share one reading among rows",
                "leave the tree to --tree auto, which decodes plainly where nothing is gained; "
                "16-bit models with wide trees gain most",
                "https://github.com/lablup/mlxcel/issues/1187",
            ),
            Finding(
                "advice",
                "models in bfloat16 are slower than in float16",
                "M1 and M2 have no arithmetic for bfloat16",
                "convert with --dtype float16 (also the scales of quantised models are then float16)",
                "https://github.com/ml-explore/mlx/pull/4216",
            ),
        ]
    found.append(
        Finding(
            "fact",
            "attention takes at most 8 rows at once, fewer with many query heads per key head",
            "rows x group must be at most 32: 8 rows for groups up to 4 (Llama 3, Qwen3-4B), 4 for "
            "groups of 7 and 8 (Qwen2.5-7B, Qwen3-32B); above that and up to 8 it is slow",
            "nothing: --tree auto leaves these sizes out",
            "https://github.com/ml-explore/mlx/pull/3838",
        )
    )
    if m.gpu.endswith("d") and gen >= 15:
        found.append(
            Finding(
                "fact",
                "on an Ultra reports disagree about 4-bit weights",
                "one has rows nearly linear in cost up to 8, another has them shared",
                "measure: specstream bench --quick",
                "https://github.com/ml-explore/mlx/issues/4265",
            )
        )
    if m.memory_bytes and m.memory_bytes <= 17 << 30:
        found.append(
            Finding(
                "fact",
                "mlx-lm keeps two thirds of the memory wired while it generates, however small the model",
                "with 16 GB and Apple Intelligence switched on, other programs may stall",
                "close large programs while generating",
                "https://github.com/exo-explore/exo/pull/1672",
            )
        )
    return found


def _linux(m: Machine) -> list[Finding]:
    if m.system == "Darwin" or not m.backend:
        return []
    found = []
    if m.backend == "cpu":
        if m.nvidia:
            found.append(
                Finding(
                    "advice",
                    "there is an NVIDIA GPU that MLX does not use",
                    "the CPU build is installed",
                    "pip install 'mlx-specstream[cuda]', then pip install --force-reinstall "
                    "--no-deps mlx-cuda-12 (both builds bring the same file; the last one counts)",
                )
            )
        if m.blas == REFERENCE_BLAS:
            found.append(
                Finding(
                    "advice",
                    "MLX computes with the reference BLAS, the slow one",
                    "every row costs the full price, so that speculation cannot gain",
                    "install libopenblas0-pthread and start with LD_PRELOAD=/usr/lib/"
                    "x86_64-linux-gnu/openblas-pthread/libblas.so.3",
                )
            )
        found.append(
            Finding(
                "fact",
                "16-bit and quantised weights are slow on the CPU, in proportion to rows",
                "MLX has no fast kernels for them there: 4-bit with bfloat16 is nine times slower than float32",
                "measure and compare in float32; quantised models are for trying things out",
                "https://github.com/ml-explore/mlx/issues/2037",
            )
        )
    else:
        found.append(
            Finding(
                "fact",
                "4-bit weights are read again for every row up to 7; from 8 rows on they are shared",
                "MLX's CUDA kernels for few rows work row by row, so 8 rows can cost less than 7",
                "leave the tree to --tree auto",
                "https://github.com/lablup/mlxcel/issues/740",
            )
        )
    return found


def _other(m: Machine) -> list[Finding]:
    if m.system in ("Darwin", "Linux"):
        return []
    return [
        Finding(
            "problem",
            f"{m.system or 'this system'} is not supported",
            "MLX runs on macOS and Linux",
            "use a Mac, or Linux (under Windows: WSL)",
        )
    ]


RULES: tuple[Callable[[Machine], list[Finding]], ...] = (
    _other,
    _installation,
    _mac_system,
    _mac_gpu,
    _linux,
)
