"""The study of what adopting takes counts what it says it counts, and runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.adopting import counted, main, measured
from mlx_specstream.doctor.sizes import Shape


def test_operations_are_counted_by_hand() -> None:
    shape = Shape("t", 10, 8, 16, 2, 1, 4, 100, tied=True)
    layer = 8 * 4 * 6 + 3 * 8 * 16  # q and o of two heads, k and v of one, three of the MLP
    texts = (54 + 96) / 96
    found = counted(shape, streams=3)
    assert found.answer == pytest.approx(2 * (10 * layer * texts + 800))
    # Base forward; three rows forward and back in four layers; the head for three rows twice, once for main.
    rows = 3 * 2 * 2 * 4 * layer
    assert found.position == pytest.approx(2 * 10 * layer * texts + rows + (2 * 3 + 1) * 4 * 800)


def test_a_prediction_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--predict", "Qwen3-4B", "--chip", "M4 Pro"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Predicted, not measured: Qwen3-4B in 4 bits on M4 Pro")
    with pytest.raises(SystemExit):
        main(["--predict", "Qwen3-4B", "--chip", "Z80"])


def test_rates_are_measured(tiny_folder: Path) -> None:
    lines = list(measured(str(tiny_folder), [2, 4], tokens=60, updates=2))
    assert [line.split(":")[0] for line in lines] == [
        "distilling, 2 side by side",
        "distilling, 4 side by side",
        "training, a text an update",
    ]
    assert all("a second of CPU time" in line for line in lines)
