"""`specstream doctor --report`: every part is in the file, also one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_specstream import cli
from mlx_specstream.doctor import report
from mlx_specstream.doctor.report import Part, markdown, run


def test_the_file_holds_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, ...]] = []
    status = {"doctor": 0, "verify": 0, "bench": 0}

    def fake(title: str, words: tuple[str, ...]) -> Part:
        ran.append(words)
        return Part(title, words, status[words[0]], f"output of {words[0]}", 2.0)

    monkeypatch.setattr(report, "run", fake)
    path = tmp_path / "report.md"
    assert cli.main(["doctor", "--report", str(path), "--model", "some-model"]) == 0
    assert [words[0] for words in ran] == ["doctor", "verify", "bench", "doctor"]
    assert all("some-model" in words for words in ran[:3])
    assert str(tmp_path / "report" / "result.json") in ran[3]
    text = path.read_text()
    assert all(f"output of {verb}" in text for verb in status)
    assert text.count("exit status 0") == 4
    # What is there is not written over, and a mismatch is the report's status.
    assert cli.main(["doctor", "--report", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err
    status["verify"] = 1
    assert cli.main(["doctor", "--report", str(tmp_path / "other.md")]) == 1


def test_a_command_that_fails_or_hangs_is_a_part_of_it() -> None:
    failed = run("x", ("verify", "--max-tokens", "0"))
    assert failed.status == 2
    assert "--max-tokens must be at least 1" in failed.output
    late = run("x", ("--help",), limit_s=0.001)
    assert late.status is None
    assert "took too long" in markdown([late])


def test_the_text_is_fit_for_an_issue() -> None:
    raw = f"\x1b[1m{Path.home()}/models\x1b[0m\n 10%\r 20%\rdone\n``` inside"
    text = markdown([Part("t", ("doctor",), 0, raw, 1.0)])
    assert str(Path.home()) not in text
    assert "~/models\ndone\n``` inside" in text
    assert "````text" in text
