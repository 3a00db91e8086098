"""Several processes that decode as one say what one process says, and end together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_specstream.cli import VERBS, main
from mlx_specstream.commands.words import EACH, TOGETHER
from mlx_specstream.model.stages import Stages
from tests.support.tiny import save_tiny_model
from tests.support.together import launch

PROGRAM = ["-m", "tests.support.together"]
GENERATE = ["-m", "mlx_specstream", "generate", "-p", "abc", "--streams", "none", "--model"]


def one_process(*words: str) -> str:
    """Return what a single process prints."""
    found = subprocess.run(
        [sys.executable, *PROGRAM, *words], capture_output=True, text=True, check=True
    )
    return found.stdout


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        (2, ["--seed", "1", "--cases", "12"]),  # sharded where mlx-lm can, else in stages
        (2, ["--seed", "2", "--cases", "8", "--pipeline"]),
        (4, ["--seed", "3", "--cases", "6"]),
    ],
)
def test_several_processes_say_what_one_says(processes: int, words: list[str]) -> None:
    expected = one_process(*words)
    leader, *followers = launch(processes, [*PROGRAM, *words])
    assert leader[1] == expected, leader[2]
    assert [status for status, _, _ in (leader, *followers)] == [0] * processes
    assert all(output == "" for _, output, _ in followers)


def test_layers_are_divided_evenly_and_each_has_one_owner() -> None:
    stages = Stages((8, 15, 22, 30), rank=1)
    assert stages.own == range(8, 15)
    parts = list(stages.split(range(5, 24)))
    assert parts == [(range(5, 8), 0), (range(8, 15), 1), (range(15, 22), 2), (range(22, 24), 3)]
    assert list(Stages.alone(4).split(range(1, 4))) == [(range(1, 4), 0)]


@pytest.mark.parametrize("verb", sorted({*VERBS} - {*TOGETHER, *EACH}))
def test_verbs_for_one_process_refuse_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    assert main([verb, "--help"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"specstream {verb} runs in one process" in said.err


def test_too_many_processes_for_the_layers_is_one_sentence(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", num_hidden_layers=2)
    ended = launch(3, [*GENERATE, str(folder), "-m", "4"])
    assert {status for status, _, _ in ended} == {2}
    assert "cannot be divided among 3 processes" in ended[0][2]
    assert "Traceback" not in "".join(errors for _, _, errors in ended)
