"""The chat as a person meets it: in a real terminal, with keys, sizes and signals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apps.parrot import save_parrot
from tests.apps.tmux import Terminal, needs_tmux

pytestmark = [pytest.mark.slow, needs_tmux]

LINES = 60
LONG = "".join(f"Line {n} of a long answer.\n\n" for n in range(LINES)) + "The end."


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parrot that talks long enough to be interrupted."""
    return save_parrot(tmp_path_factory.mktemp("models") / "long", LONG, context=16384)


@pytest.fixture
def terminal(long_folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    with start(long_folder, tmp_path) as terminal:
        yield terminal


def start(model: Path, folder: Path, *options: str, width: int = 80, height: int = 24) -> Terminal:
    root = str(Path(__file__).parents[2])
    return Terminal(
        folder,
        ["chat", "--model", str(model), "--tree", "4", *options],
        width=width,
        height=height,
        env={"SPECSTREAM_STATE": str(folder / "state"), "PYTHONPATH": root, "LC_ALL": "C.UTF-8"},
    )


def test_a_whole_conversation(terminal: Terminal, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    terminal.wait("^1 ›")

    # Ctrl-C inside an answer, then another question.
    terminal.line("first")
    terminal.wait("Line 3 of")
    terminal.keys("C-c")
    text = terminal.wait(r"^\(stopped\)")
    assert "The end." not in text
    terminal.line("second")
    terminal.wait("The end.")

    # Several lines: a backslash, Alt-Enter, a paste; nothing is sent before Enter.
    terminal.wait("^3 ›")
    terminal.keys("one \\", "Enter", "two", "M-Enter")
    terminal.paste("three\nfour")
    terminal.wait("^ +four")
    terminal.keys("Enter")
    terminal.wait("^4 ›")

    # A paste while an answer runs waits as one text.
    terminal.line("fourth")
    terminal.wait("Line 2 of", count=4)
    terminal.paste("five\nsix")
    terminal.wait("^5 › five\n +six")
    terminal.keys("C-c")

    # An earlier question is changed; the later ones are gone.
    terminal.line("/edit 2")
    terminal.wait("^edit 2 › second")
    terminal.keys("!", "Enter")
    terminal.wait("^3 ›", count=2)
    terminal.line(f"/save {saved}")
    terminal.wait(r"\(saved to")
    conversation = json.loads(saved.read_text())
    assert [e["question"] for e in conversation["exchanges"]] == ["first", "second!"]
    assert conversation["exchanges"][0]["stopped"]
    assert conversation["exchanges"][1]["answer"] == LONG

    terminal.line("/clear")
    terminal.wait("^1 ›", count=2)
    terminal.line("after")
    terminal.wait("^2 ›", count=2)
    terminal.line(f"/load {saved}")
    terminal.wait(r"^\(loaded, 2 questions\)")
    terminal.line("/retry")
    terminal.wait("^3 ›", count=5)

    # Ctrl-C at the prompt does not leave, Ctrl-D does.
    terminal.keys("typed", "C-c")
    terminal.wait(r"^\(Ctrl-D or /quit leaves\)", count=2)
    terminal.keys("C-d")
    assert terminal.exit_status() == 0
    assert "Traceback" not in terminal.everything()


def test_a_conversation_is_resumed(long_folder: Path, tmp_path: Path) -> None:
    for number, options in ((1, ()), (2, ("--resume",))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "state").symlink_to(tmp_path)
        with start(long_folder, folder, "--max-tokens", "8", *options) as terminal:
            terminal.wait(f"^{number} ›")
            terminal.line(f"question {number}")
            terminal.wait(f"^{number + 1} ›")
            terminal.keys("C-d")
            assert terminal.exit_status() == 0
    (kept,) = (tmp_path / "conversations").iterdir()
    exchanges = json.loads(kept.read_text())["exchanges"]
    assert [e["question"] for e in exchanges] == ["question 1", "question 2"]
    assert "question 1" in (tmp_path / "chat-history").read_text()
    assert (tmp_path / "chat-history").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("width", [40, 120])
def test_nothing_is_drawn_twice(parrot_folder: Path, tmp_path: Path, width: int) -> None:
    with start(parrot_folder, tmp_path, width=width, height=14) as terminal:
        terminal.wait("^1 ›")
        terminal.line("fruit?")
        text = terminal.wait("^2 ›")
        for once in ("Fruit", "👍🏽", "quince", r"def add\(a, b\):", "That is all, naïve"):
            assert len(re.findall(once, text)) == 1, text
        assert "tok/s" not in text[: text.index("2 ›")], "the status line is gone"


def test_the_window_may_change_its_size(terminal: Terminal) -> None:
    terminal.wait("^1 ›")
    terminal.line("go")
    terminal.wait("Line 4 of")
    terminal.resize(40, 10)
    terminal.wait("Line 20 of")
    terminal.resize(120, 30)
    text = terminal.wait("^2 ›")
    for number in range(LINES):
        assert f"Line {number} of a long answer." in text
    assert len(re.findall(r"Line \d+ of", text)) <= LINES + 3, "at most a few lines are left over"


def test_drafts_are_coloured(parrot_folder: Path, tmp_path: Path) -> None:
    with start(parrot_folder, tmp_path, "--draft") as terminal:
        terminal.wait("^1 ›")
        terminal.line("fruit?")
        terminal.wait("^2 ›")
        terminal.line("/draft")
        terminal.wait("main stream · stream 1¹ · stream 2²", count=2)
        coloured = terminal.everything(colours=True)
        assert "\x1b[32m" in coloured, "stream 1 is green"
        assert "\x1b[2;9m" in coloured or "\x1b[9m" in coloured, "rejected drafts are struck"


def test_ctrl_c_at_a_dumb_terminals_prompt_does_not_end_the_chat(
    parrot_folder: Path, tmp_path: Path
) -> None:
    root = str(Path(__file__).parents[2])
    env = {"SPECSTREAM_STATE": str(tmp_path), "PYTHONPATH": root, "LC_ALL": "C.UTF-8"}
    options = ["chat", "--model", str(parrot_folder), "--tree", "4"]
    with Terminal(tmp_path, options, env={**env, "TERM": "dumb"}) as terminal:
        terminal.wait("1 ›")
        terminal.keys("C-c")
        terminal.wait("Ctrl-D or /quit leaves")
        terminal.line("/quit")
        assert terminal.exit_status() == 0
