"""Diagnoses of described machines: each rule fires where it must, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_specstream.doctor.finding import older, version
from mlx_specstream.doctor.findings import findings
from mlx_specstream.machine import Machine

M4_PRO = Machine(
    system="Darwin", os_version="26.3", arch="arm64", chip="Apple M4 Pro", cores=12,
    memory_bytes=24 << 30, backend="metal", gpu="applegpu_g16s", working_set_bytes=17 << 30,
    python="3.12.4", mlx="0.32.4", mlx_lm="0.32.2", mlx_specstream="0.1.0",
)  # fmt: skip
M1 = replace(M4_PRO, chip="Apple M1", gpu="applegpu_g13g", memory_bytes=16 << 30)
M5 = replace(M4_PRO, chip="Apple M5", gpu="applegpu_g17g")
NEO = replace(M4_PRO, chip="Apple A18 Pro", gpu="applegpu_g17p", memory_bytes=8 << 30)
# What MLX says of itself on a hosted machine for workflows.
VIRTUAL = replace(M4_PRO, chip="Apple M1 (Virtual)", gpu="air64_v27", memory_bytes=7 << 30)
LINUX = Machine(
    system="Linux", os_version="6.8", arch="x86_64", cores=2, memory_bytes=24 << 30, backend="cpu",
    blas="OpenBLAS", python="3.11.7", mlx="0.32.4", mlx_lm="0.32.2",
)  # fmt: skip
CUDA = replace(LINUX, backend="cuda", gpu="NVIDIA H200", blas="", nvidia=True)


def said(machine: Machine, level: str = "") -> str:
    return "\n".join(f.what for f in findings(machine) if level in ("", f.level))


@pytest.mark.parametrize("machine", [M4_PRO, M1, M5, NEO, VIRTUAL, LINUX, CUDA])
def test_a_good_machine_has_no_problem(machine: Machine) -> None:
    assert said(machine, "problem") == ""


@pytest.mark.parametrize(
    ("machine", "what"),
    [
        (replace(M4_PRO, python="3.9.18"), "Python 3.9.18 is older than 3.10"),
        (replace(M4_PRO, mlx="0.30.1"), "MLX 0.30.1 is older than 0.31.2"),
        (replace(M4_PRO, mlx_lm="0.31.2"), "mlx-lm 0.31.2 is older"),
        (replace(M4_PRO, mlx_lm=""), "mlx-lm is not installed"),
        (replace(M4_PRO, mlx_error="no libmlx", backend=""), "cannot be imported: no libmlx"),
        (replace(M4_PRO, arch="x86_64", translated=True, backend="cpu"), "under Rosetta"),
        (replace(M4_PRO, arch="x86_64", gpu="", backend="cpu"), "an Intel processor"),
        (replace(M4_PRO, backend="cpu", gpu=""), "does not use the GPU"),
        (replace(M4_PRO, os_version="13.6"), "macOS 13.6 is older than 14"),
        (replace(M5, os_version="26.1"), "has no neural accelerators for MLX"),
        (Machine(system="Windows"), "Windows is not supported"),
        (Machine(), "this system is not supported"),
    ],
)
def test_problems(machine: Machine, what: str) -> None:
    assert what in said(machine, "problem")


@pytest.mark.parametrize(
    ("machine", "what", "but_not"),
    [
        (replace(M4_PRO, os_version="14.7"), "cannot keep weights in memory", M4_PRO),
        (replace(M4_PRO, low_power=True), "Low Power Mode", M4_PRO),
        (replace(M4_PRO, mlx="0.31.2"), "reads 4-bit weights once for every row", M4_PRO),
        (replace(M4_PRO, mlx="0.32.0"), "slow at a few rows in 16 bits", M4_PRO),
        (replace(M5, os_version="15.6"), "neural accelerators are not used", M5),
        (M1, "bfloat16 are slower than in float16", M4_PRO),
        (replace(LINUX, blas="reference BLAS"), "reference BLAS", LINUX),
        (replace(LINUX, nvidia=True), "NVIDIA GPU that MLX does not use", CUDA),
    ],
)
def test_advice(machine: Machine, what: str, but_not: Machine) -> None:
    assert what in said(machine, "advice")
    assert what not in said(but_not)


def test_facts_follow_the_chip() -> None:
    assert "(affine) gain little" in said(M1, "fact")
    assert "gain little" not in said(M4_PRO)
    assert "16-bit models gain most" in said(M4_PRO, "fact")
    assert "cannot be paged out, up to two thirds" in said(M1)
    assert "two thirds" not in said(M4_PRO)
    assert "as in a virtual machine" in said(VIRTUAL, "fact")
    assert "16-bit models gain most" not in said(VIRTUAL)
    assert "virtual" not in said(M4_PRO)
    assert "Ultra" in said(replace(M4_PRO, gpu="applegpu_g15d"))
    assert "Ultra" not in said(M4_PRO)
    assert "from 8 rows on" in said(CUDA)


def test_what_mlx_makes_of_float32_is_said() -> None:
    machines = ((M5, True), (CUDA, True), (M4_PRO, False), (NEO, False), (LINUX, False))
    for machine, rounds in machines:
        assert ("float32 is not quite float32" in said(machine, "fact")) is rounds
    assert "float32 is not quite" not in said(replace(M5, tf32=False))
    assert "float32 is not quite" not in said(replace(M5, os_version="26.1"))


def test_nothing_is_said_that_mlx_sources_contradict() -> None:
    """What `get_qmv_batch_limit`, `qmv_wide` and the attention of MLX 0.32 do, read in its sources."""

    def why(machine: Machine) -> str:
        return " ".join(f"{f.what} {f.why}" for f in findings(machine))

    # Of M1 and M2 only affine weights are read row by row, and on Ultras up to eleven rows.
    assert "each of up to 5 rows" in why(M1)
    assert "each of up to 11 rows" in why(replace(M1, gpu="applegpu_g13d"))
    assert "mxfp4 and nvfp4 weights share it" in why(M1)
    # More than eight rows are not refused, but go to another kernel.
    assert "at most 8 rows at once" not in why(M4_PRO)
    assert "heads of 256" in why(M4_PRO)
    assert "each of up to 6 rows" in why(replace(M1, gpu="applegpu_g13s"))
    # The A18 Pro is of M5's generation by number alone: nothing of neural accelerators is said of it.
    assert "16-bit models gain most" in why(NEO)
    for release in ("15.6", "26.1", "26.3"):
        assert "neural accelerators" not in why(replace(NEO, os_version=release))
    # A limit on what is wired wires nothing by itself: only what MLX has allocated.
    assert "however small the model" not in why(M1)


def test_every_finding_says_what_to_do() -> None:
    odd = replace(M1, python="2.7", mlx="0.1", mlx_lm="0.1", os_version="12.0", low_power=True)
    for finding in findings(odd) + findings(replace(LINUX, blas="reference BLAS", nvidia=True)):
        assert finding.what
        assert finding.why
        assert finding.do


def test_problems_come_first() -> None:
    levels = [f.level for f in findings(replace(M1, mlx="0.30.0", low_power=True))]
    assert levels == sorted(levels, key=("problem", "advice", "fact").index)
    assert len(set(levels)) == 3


def test_versions() -> None:
    assert version("0.32.1.dev20260801+abc") == (0, 32, 1)
    assert version("unknown") == ()
    assert older("0.9", "0.31.2")
    assert not older("0.32", "0.31.2")
    assert not older("", "1.0")
