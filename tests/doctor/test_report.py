"""`specstream doctor --report`: every part is in the file at once, and it goes on where it was ended."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_specstream import cli
from mlx_specstream.bench.result import Result
from mlx_specstream.doctor import part as part_module
from mlx_specstream.doctor import report
from mlx_specstream.doctor.part import Part, run
from mlx_specstream.doctor.report import markdown

VERBS = ["doctor", "verify", "bench", "doctor"]


class Commands:
    """Stands for the commands: notes which were run and what the file held then; `ends` may end one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ran: list[tuple[str, ...]] = []
        self.seen: list[str] = []
        self.ends: dict[str, dict[str, Any]] = {}

    def __call__(self, part: Part) -> Part:
        words = part.then or part.words
        self.ran.append(words)
        self.seen.append(self.path.read_text())
        done = {"end": "itself", "status": 0, "output": f"said by {words[0]}\n", "seconds": 2.0}
        return replace(part, **{**done, **self.ends.get(words[0], {})})

    @property
    def verbs(self) -> list[str]:
        return [words[0] for words in self.ran]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.md"


@pytest.fixture
def commands(path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands(path)
    monkeypatch.setattr(report, "run", made)
    return made


@pytest.fixture
def asked(path: Path) -> Callable[..., int]:
    return lambda *words: cli.main(["doctor", "--report", str(path), *words])


def test_the_file_is_written_after_every_part(
    path: Path, commands: Commands, asked: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked("--model", "some-model") == 0
    assert commands.verbs == VERBS
    assert all("some-model" in words for words in commands.ran[:3])
    assert str(path.parent / "report" / "result.json") in commands.ran[3]
    for done, text in enumerate(commands.seen):
        assert text.count("| done, 2 s |") == done
        assert text.count("| not run |") == 4 - done
        assert "**Not complete**: " in text
        assert f"doctor --report {path} --model some-model`" in text
    text = path.read_text()
    assert all(f"said by {verb}" in text for verb in VERBS)
    assert "Not complete" not in text
    # What each will take is said before it begins.
    told = capsys.readouterr().out
    assert "4 parts, about five minutes in all" in told
    assert re.findall(r"(\d) of 4, (?:some|about)", told) == ["1", "2", "3", "4"]
    # A complete report is not written over.
    assert asked("--model", "some-model") == 2
    assert "is there already and complete" in capsys.readouterr().err
    assert path.read_text() == text


@pytest.mark.parametrize(("end", "told"), [("key", "interrupted"), ("limit", "took too long")])
def test_a_part_that_was_stopped_is_in_it_and_is_run_again(
    end: str, told: str, path: Path, commands: Commands, asked: Callable[..., int]
) -> None:
    commands.ends["verify"] = {"end": end, "status": None, "output": "[1/12] one\n"}
    # Ctrl-C ends the report, too; a command that hangs does not keep the others from running.
    assert asked() == (130 if end == "key" else 1)
    text = path.read_text()
    assert told in text
    assert "[1/12] one" in text
    missing = "are the answers the same" + (
        "; is it faster here; what was predicted for this chip" if end == "key" else ""
    )
    assert f"**Not complete**: {missing}. Go on with `specstream doctor --report {path}`." in text
    ran = len(commands.ran)
    commands.ends.clear()
    assert asked() == 0
    assert commands.verbs[ran:] == (VERBS[1:] if end == "key" else ["verify"])
    text = path.read_text()
    assert "Not complete" not in text
    assert "said by doctor" in text  # kept from the first time


def test_what_bench_measured_is_not_measured_again(
    path: Path, commands: Commands, asked: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.ends["bench"] = {"end": "key", "status": None}
    assert asked() == 130
    result = path.with_suffix("") / "result.json"
    result.write_text("")
    for complete, how in ((False, "--resume"), (True, "--from")):
        monkeypatch.setattr(Result, "load", lambda _, c=complete: SimpleNamespace(complete=c))
        assert asked() == 130
        assert commands.ran[-1] == ("bench", how, str(result), "--no-plots")
        assert f"`specstream bench {how} {result}" in path.read_text()


def test_a_failure_is_the_reports_own_status(
    path: Path, commands: Commands, asked: Callable[..., int]
) -> None:
    commands.ends["verify"] = {"status": 1}
    assert asked() == 1
    assert "| Are the answers the same | done, and something is wrong: exit status 1, 2 s |" in (
        path.read_text()
    )
    assert asked() == 2, "answers that differ are an answer, which is not asked for again"


def test_a_command_that_could_not_run_is_tried_again(
    commands: Commands, asked: Callable[..., int]
) -> None:
    commands.ends["bench"] = {"status": 2}
    assert asked() == 1
    commands.ends.clear()
    commands.ran.clear()
    assert asked() == 0
    assert commands.verbs == ["bench"]


def test_only_a_report_of_the_same_is_gone_on_with(
    path: Path,
    commands: Commands,
    asked: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands.ends["doctor"] = {"end": "key", "status": None}
    assert asked() == 130
    assert asked("--model", "other") == 2
    assert "another model" in capsys.readouterr().err
    monkeypatch.setattr(report, "_machine", lambda: "another one")
    assert asked() == 2
    assert "on another machine" in capsys.readouterr().err
    for text in ("", "[]", "{}", '{"parts": [{}], "machine": ""}'):
        (path.with_suffix("") / "parts.json").write_text(text)
        assert asked() == 2
        assert "no report that could be gone on with" in capsys.readouterr().err
    assert cli.main(["doctor", "--report", str(path.with_suffix(""))]) == 2
    assert "has no ending" in capsys.readouterr().err
    path.with_name("notes.md").write_text("mine")
    assert cli.main(["doctor", "--report", str(path.with_name("notes.md"))]) == 2
    assert path.with_name("notes.md").read_text() == "mine"


def test_a_command_that_fails_or_hangs_is_a_part_of_it() -> None:
    failed = run(Part("x", ("verify", "--max-tokens", "0")))
    assert (failed.end, failed.status) == ("itself", 2)
    assert "--max-tokens must be at least 1" in failed.output
    assert "without an answer: exit status 2" in markdown([failed])
    late = run(Part("x", ("--help",)), limit_s=0.001)
    assert (late.end, late.status) == ("limit", None)
    assert "took too long" in markdown([late])


def test_a_command_that_does_not_stop_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_module, "PATIENCE_S", 0.5)
    monkeypatch.setattr(part_module.signal, "SIGINT", signal.SIGCONT)  # which it does not notice
    found = run(Part("x", ("chat", "--help")), limit_s=0.001)
    assert found.end == "limit"


def test_ctrl_c_reaches_the_command_and_what_it_knows_is_kept(folder: str) -> None:
    """The key comes when verify has told of its first prompt: from then on it has something to say."""

    def show(line: str) -> None:
        shown.append(line)
        if "[1/12]" in line:
            os.kill(os.getpid(), signal.SIGINT)

    shown: list[str] = []
    words = ("verify", "--model", folder, "--num-prompts", "12", "--max-tokens", "48")
    found = run(Part("x", words), show=show)
    assert (found.end, found.status) == ("key", None)
    assert "interrupted after" in found.output
    assert " of 12 prompts, answers of up to" in found.output
    assert [line.strip() for line in shown] == [line.strip() for line in found.output.splitlines()]


def test_the_text_is_fit_for_an_issue() -> None:
    raw = f"\x1b[1m{Path.home()}/models\x1b[0m\n 10%\r 20%\rdone\n``` inside"
    text = markdown([Part("t", ("doctor",), "", "itself", 0, raw, 1.0)])
    assert str(Path.home()) not in text
    assert "~/models\ndone\n``` inside" in text
    assert "````text" in text
