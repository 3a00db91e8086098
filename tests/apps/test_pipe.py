"""`echo hi | specstream chat`: plain text out, no escape codes, exit 0."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mlx_specstream
from mlx_specstream.cli import main
from tests.apps.parrot import ANSWER


def run(
    folder: Path, lines: bytes, *options: str, **env: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the program as a shell does."""
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "mlx_specstream.cli", "chat", "--model", str(folder), *options],
        input=lines,
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": root, "TERM": "xterm-256color", **env},
    )


@pytest.fixture
def chat(
    parrot: tuple[object, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Run the program here: status, standard output and standard error."""

    def here(lines: bytes, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(mlx_specstream, "load", lambda *_, **__: parrot)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        capsys.readouterr()
        status = main(["chat", *options])
        return status, *capsys.readouterr()

    return here


def test_a_line_gives_an_answer(parrot_folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = run(parrot_folder, b"hi\n", SPECSTREAM_STATE=str(state), FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == ANSWER + "\n"
    assert b"\x1b" not in done.stdout + done.stderr
    assert not state.exists(), "a pipe leaves nothing behind"


def test_every_line_is_a_turn(chat: Callable[..., tuple[int, str, str]]) -> None:
    lines = "/system be kind\none \\\ntwo\n\n//three\n/edit 1 new\n/tokens\n/draft\n/quit\nnever\n"
    status, text, _ = chat(lines.encode(), "--tree", "4")
    assert status == 0
    assert text.count("That is *all*") == 3
    assert text.count("tokens in all of 2048") == 1
    assert "main stream · stream 1¹ · stream 2²" in text
    assert "~" in text, "rejected drafts stand between tildes"
    assert "\x1b" not in text


def test_single_letters_of_mlx_lm_chat(chat: Callable[..., tuple[int, str, str]]) -> None:
    status, text, err = chat(b"one\nr\n/tokens\nh\ntwo\nq\nnever\n")
    assert status == 0
    assert text.count("That is *all*") == 2
    assert "0 tokens in all" in text
    assert "/retry" in text
    assert "a new conversation" in err
    # With anything beside it a letter is text, as there.
    assert chat(b" q\n")[1] == ANSWER + "\n"


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (b"/nothing\nhi\n", "there is no command /nothing"),
        (b"/set tree 1x\nhi\n", "cannot read the tree"),
        (b"/set what 1\nhi\n", "there is no setting 'what'"),
        (b"/set top-k many\nhi\n", "top-k must be a whole number"),
        (b"/load nowhere.json\nhi\n", "No such file"),
        (b"/edit 3 x\nhi\n", "the questions are none yet"),
        (b"/retry\nhi\n", "ask something first"),
        (b"/draft\nhi\n", "there is no answer yet"),
        (b"/quit now\nhi\n", "takes nothing"),
    ],
)
def test_a_line_that_cannot_be_used(
    chat: Callable[..., tuple[int, str, str]], lines: bytes, complaint: str
) -> None:
    status, out, err = chat(lines)
    assert status == 2
    assert out == ANSWER + "\n", "the others are"
    (line,) = err.splitlines()
    assert complaint in line


def test_bytes_that_are_no_text(chat: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = chat(b"\xff\xfe\n")
    assert status == 2
    assert out == ""
    assert "not UTF-8" in err


@pytest.mark.parametrize(
    "options", [["--top-p", "2"], ["--max-tokens", "0"], ["--resume", "nowhere.json"]]
)
def test_options_are_checked_before_the_model_is_loaded(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--model", "no-model", *options]) == 2
    err = capsys.readouterr().err
    assert "no-model" not in err
    assert len(err.splitlines()) == 1
