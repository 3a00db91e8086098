"""What is known of Macs: their processors and systems, versions their GPUs need, and what rows cost."""

from __future__ import annotations

from collections.abc import Iterator

from ..machine import Machine
from .finding import Finding, advice, fact, older, problem, version

WIRED = "https://github.com/ml-explore/mlx-lm#large-models"
RESIDENT = "https://github.com/ml-explore/mlx/blob/main/mlx/backend/metal/resident.cpp"


def system(m: Machine) -> Iterator[Finding]:
    """Yield what keeps MLX from the GPU, or slows it down, whatever the chip."""
    if m.system != "Darwin":
        return
    if m.translated:
        yield problem(
            "this Python runs under Rosetta, as an Intel program",
            "MLX has no Metal there, so nothing runs on the GPU",
            "install a native (arm64) Python and make the environment anew; "
            "`python -c 'import platform; print(platform.machine())'` must say arm64",
            "https://github.com/ml-explore/mlx/issues/200",
        )
    elif m.arch == "x86_64":
        yield problem(
            "this is a Mac with an Intel processor",
            "MLX computes on Apple silicon GPUs; on Intel there is only the CPU, if it installs",
            "use a Mac with Apple silicon",
        )
    elif m.backend == "cpu":
        conda = " This environment is conda's." if m.conda else ""
        yield problem(
            "MLX does not use the GPU here",
            f"it was built without Metal, or its device was set to the CPU.{conda}",
            "install the wheel: pip install --force-reinstall mlx mlx-metal",
            "https://github.com/ml-explore/mlx-examples/issues/1306",
        )
    elif m.backend == "metal" and not m.gpu_generation:
        yield fact(
            f"the GPU is none of Apple's known ones ({m.gpu or 'it has no name'}), as in a virtual machine",
            "a virtual Metal device computes the same with kernels that MLX picks as for an unknown chip",
            "figures taken here say nothing about a Mac; answers may be compared (verify)",
            "https://github.com/rajveer43/VeloxQuant-MLX/issues/395",
        )
    if older(m.os_version, "14.0"):
        yield problem(
            f"macOS {m.os_version} is older than 14",
            "MLX is no longer built for it",
            "update macOS",
            "https://github.com/ml-explore/mlx/pull/2731",
        )
    elif older(m.os_version, "15.0"):
        yield advice(
            f"macOS {m.os_version} cannot keep weights in memory (wire them)",
            "models that fill most of the memory are paged out and become many times slower",
            "update to macOS 15 or newer for models over half the memory",
            WIRED,
        )
    if m.low_power:
        yield advice(
            "Low Power Mode is on",
            "the GPU runs slower, and measured costs are not those of normal use",
            "turn it off in System Settings, Battery",
        )


def versions(m: Machine) -> Iterator[Finding]:
    """Yield what versions of macOS and MLX lack on this generation of the GPU."""
    gen = m.gpu_generation
    if not gen or m.backend != "metal":
        return
    new = m.has_neural_accelerators
    if new and version(m.os_version)[:1] == (26,) and older(m.os_version, "26.2"):
        yield problem(
            f"macOS {m.os_version} on an M5 has no neural accelerators for MLX, which assumes them",
            "the wheel for macOS 26 is built for 26.2 and picks kernels this system does not have",
            "update to macOS 26.2 or newer",
            "https://github.com/ml-explore/mlx/issues/4525",
        )
    elif new and older(m.os_version, "26.2"):
        yield advice(
            "the M5's neural accelerators are not used",
            "MLX needs macOS 26.2 for them; reading prompts is slower without",
            "update to macOS 26.2 or newer",
            "https://github.com/ml-explore/mlx/pull/3622",
        )
    if gen >= 15 and older(m.mlx, "0.32.0"):
        yield advice(
            f"MLX {m.mlx} reads 4-bit weights once for every row",
            "verifying four rows costs twice what it costs since 0.32.0",
            "pip install -U mlx",
            "https://github.com/ml-explore/mlx/pull/3764",
        )
    if gen >= 15 and older(m.mlx, "0.32.1"):
        yield advice(
            f"MLX {m.mlx} is slow at a few rows in 16 bits",
            "since 0.32.1 up to five rows cost about as much as one",
            "pip install -U mlx",
            "https://github.com/ml-explore/mlx/pull/3888",
        )


def rows(m: Machine) -> Iterator[Finding]:
    """Yield what the GPU charges for several rows, and so which trees can pay."""
    gen, ultra = m.gpu_generation, m.gpu.endswith("d")
    if not gen or m.backend != "metal":
        return
    alone = 11 if ultra else 6 if m.gpu == "applegpu_g13s" else 5  # M1 Pro and Max: 6
    if gen >= 15:
        yield fact(
            "16-bit models gain most: up to 5 rows cost about as much as one, 15 at most twice",
            "4-bit weights cost about half as much again at 4 rows and 2.7 times at 8 (M4 Pro)",
            "leave the tree to --tree auto; with 4 bits expect chains, with 16 bits trees",
            "https://github.com/ml-explore/mlx/issues/3839",
        )
    else:
        yield fact(
            "models in 4 and 8 bits (affine) gain little: each of a few rows reads all weights again",
            f"M1 and M2 lack the kernel that shares a reading; large matrices are read anew for each of "
            f"up to {alone} rows, small ones for more. mxfp4 and nvfp4 weights share "
            "it from MLX 0.32.0 on",
            "leave the tree to --tree auto, which decodes plainly where nothing is gained; "
            "16-bit models with wide trees gain most",
            "https://github.com/lablup/mlxcel/issues/1187",
        )
        yield advice(
            "models in bfloat16 are slower than in float16",
            "M1 and M2 have no arithmetic for bfloat16",
            "convert with --dtype float16 (also the scales of quantised models are then float16)",
            "https://github.com/ml-explore/mlx/pull/4216",
        )
    yield fact(
        "models in 32 bits are the worst case",
        "no kernel shares a reading of float32 weights among a few rows: two rows cost as much as "
        "sixteen",
        "judge by a model of your own in 16 or 4 bits; with 32 bits take a wide tree",
    )
    yield fact(
        "attention is fused for up to 8 rows, fewer with many query heads per key head",
        "rows x group must be at most 32: 8 rows for groups up to 4 (Llama 3, Qwen3-4B), 4 for "
        "groups of 7 and 8 (Qwen2.5-7B, Qwen3-32B). More than 8 rows go to another kernel, which "
        "walks a long context once per head and takes heads of 64 to 128 channels; heads of 256 "
        "(Gemma) are fused up to 8 rows alone, heads of 512 (Gemma 4's global layers) for one row",
        "nothing: what falls off is attended in pieces that do not, and --tree auto leaves it out",
        "https://github.com/ml-explore/mlx/pull/3838",
    )
    if ultra and gen >= 15:
        yield fact(
            "on an Ultra reports disagree about 4-bit weights",
            "one has rows nearly linear in cost up to 8, another has them shared",
            "measure: specstream bench --quick",
            "https://github.com/ml-explore/mlx/issues/4265",
        )


def memory(m: Machine) -> Iterator[Finding]:
    """Yield what generating does to a small memory."""
    if not m.gpu_generation or m.backend != "metal":
        return
    if m.memory_bytes and m.memory_bytes <= 17 << 30:
        yield fact(
            "what MLX holds while it generates cannot be paged out, up to two thirds of the memory",
            "weights, KV cache and buffers kept for reuse are wired from macOS 15 on; with 16 GB or "
            "less and a model near that limit, other programs may stall",
            "take a model that leaves room (the table below), or close large programs meanwhile",
            RESIDENT,
        )
