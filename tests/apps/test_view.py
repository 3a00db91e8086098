"""What is drawn: on a screen of a fixed size, with every control sequence accounted for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mlx_specstream import StreamModel
from mlx_specstream.apps.chat.drafts import DraftView, drawing, mark
from mlx_specstream.apps.chat.live_region import LiveRegion
from mlx_specstream.apps.chat.markdown import BlockSplitter
from mlx_specstream.apps.chat.session import ChatSession, DraftStep, Reply
from mlx_specstream.apps.chat.status import fitted, wrapped
from mlx_specstream.apps.chat.text import on_one_line, printable
from mlx_specstream.apps.chat.view import PlainView, TerminalView, block_lines
from mlx_specstream.apps.conversation import Conversation
from mlx_specstream.speculation.result import DraftRecord
from tests.apps.parrot import ANSWER
from tests.apps.screen import Screen
from tests.support.engine import examples


def console_for(screen: Screen, **options: Any) -> Console:
    return Console(
        file=screen,  # type: ignore[arg-type]
        width=screen.width,
        height=screen.height,
        force_terminal=True,
        color_system="standard",
        legacy_windows=False,
        **options,
    )


def say(screen: Screen, view: TerminalView, session: ChatSession) -> Reply:
    """Answer on the screen."""
    conversation = Conversation()
    conversation.ask("fruit?")
    answer = view.answer(lambda reply: ["status"], None, 2)
    for _ in session.answer(conversation):
        assert session.current is not None
        answer.feed(session.current)
    answer.finish()
    assert session.reply is not None
    return session.reply


@pytest.mark.parametrize("height", [8, 24])
@pytest.mark.parametrize("width", [20, 40, 120])
def test_a_growing_answer_ends_as_the_whole_one(
    parrot: tuple[StreamModel, Any], width: int, height: int
) -> None:
    screen, whole = Screen(width, height), Screen(width, 1000)
    view = TerminalView(console_for(screen), screen)  # type: ignore[arg-type]
    say(screen, view, ChatSession(*parrot))
    TerminalView(console_for(whole), whole).markdown(ANSWER)  # type: ignore[arg-type]
    assert screen.text == whole.text
    assert screen.cursor_shown
    assert "status" not in screen.text
    for shown in ("你好", "👍🏽", "<b>quince</b>", "naïve"):
        assert shown in screen.text


LINES = st.lists(st.sampled_from(["one", "two", "三", "", "four"]), max_size=4)


@examples(50)
@given(st.lists(st.tuples(LINES, LINES), max_size=6))
def test_a_region_shows_its_last_lines_below_all_final_ones(
    updates: list[tuple[list[str], list[str]]],
) -> None:
    screen = Screen(20, 30)
    region = LiveRegion(console_for(screen), screen)  # type: ignore[arg-type]
    final: list[str] = []
    for done, live in updates:
        region.update(done, live)
        final += done
        assert screen.text == "\n".join([*final, *live]).rstrip("\n")
    region.close(["end"])
    assert screen.text == "\n".join([*final, "end"])


@examples(40)
@given(st.lists(st.sampled_from([*"ab -#`*1.\n\n", "```\n", "- ", "\n\n", "| a |\n|---|\n"])))
def test_blocks_are_the_text(pieces: list[str]) -> None:
    splitter = BlockSplitter()
    blocks = [block for piece in pieces for block in splitter.feed(piece)]
    text = "".join(pieces)
    joined = "\n".join([*blocks, splitter.rest])
    assert "".join(joined.split()) == "".join(text.split()), "nothing is lost or doubled"


def test_a_block_is_complete_when_nothing_can_change_it() -> None:
    splitter = BlockSplitter()
    assert splitter.feed("a paragraph\nthat goes on\n") == []
    assert splitter.feed("\n#") == []
    assert splitter.feed(" head\n") == ["a paragraph\nthat goes on\n"]
    assert splitter.feed("```\n# no head\n\n- no list\n") == ["# head"]
    assert splitter.feed("```\n") == []
    assert splitter.rest.startswith("```")


@pytest.mark.parametrize("text", ["<think>why</think>", "<div>\nx\n</div>", "![a](b.png)", "a\nb"])
def test_nothing_a_model_says_is_left_out(text: str) -> None:
    shown = "\n".join(block_lines(Console(width=60, color_system=None), text, 60))
    for word in ("think", "why", "div", "x", "b.png"):
        assert (word in text) == (word in shown)
    if text == "a\nb":
        assert shown == text


def test_no_escape_sequence_survives() -> None:
    text = printable("a\x1b]0;title\x07b\x9b31m\u202ec\r\n\td\ud800")
    assert not any(ord(c) < 0x20 and c not in "\n\t" for c in text)
    assert "\x9b" not in text
    assert "\u202e" not in text
    assert text.startswith("a␛]0;title␇b")
    assert printable("👨‍👩‍👧 ‍ naïve 中文") == "👨‍👩‍👧 ‍ naïve 中文"
    assert on_one_line("a\n\tb") == "a⏎⇥b"


def test_parts_of_a_status_are_not_broken() -> None:
    parts = ["Some-Model-4bit", "lossless", "context 8192", "/help"]
    assert wrapped(parts, 80) == "Some-Model-4bit · lossless · context 8192 · /help"
    assert wrapped(parts, 30) == "Some-Model-4bit · lossless\ncontext 8192 · /help"
    assert wrapped(parts, 5).splitlines() == parts


def test_the_status_line_fits() -> None:
    parts = ["12.0 tok/s", "2.10 tok/step", "1.50× plain", "lossless"]
    assert fitted(parts, 80) == "12.0 tok/s · 2.10 tok/step · 1.50× plain · lossless"
    assert fitted(parts, 40) == "12.0 tok/s · 2.10 tok/step · 1.50× plain"
    assert fitted(parts, 5) == ""


STEP = DraftStep(
    list(b" is"),
    [1, 2, 0],
    DraftRecord(list(b"x a?i s"), [0, 0, 0, 1, 1, 5, 5], [0, 1, 1, 2, 2, 1, 2], [0, 1, 3]),
)


@pytest.mark.parametrize("coloured", [True, False])
def test_drafts_can_be_read_with_and_without_colour(byte_tokenizer: Any, coloured: bool) -> None:
    view = DraftView(byte_tokenizer, coloured=coloured)
    console = Console(width=40, color_system="standard" if coloured else None, force_terminal=True)
    with console.capture() as capture:
        console.print(drawing(view, [STEP], 2))
    text = capture.get()
    assert "stream 1¹" in text
    if coloured:
        assert "\x1b[32m¹" in text, "stream 1 is green"
        assert "\x1b[2;9m" in text, "rejected drafts are struck through"
    else:
        assert "  1  ¹i²s" in text
        assert "✗ ¹~a~ ~␣~ ²~i~ ~s~" in text
        assert "\x1b" not in text


def test_a_character_in_several_tokens_is_shown_once(byte_tokenizer: Any) -> None:
    view = DraftView(byte_tokenizer, coloured=False)
    console = Console(width=40, color_system=None)
    with console.capture() as capture:
        console.print(view.step(DraftStep(list("é!".encode()), [1, 2, 0], None)))
    assert capture.get().split()[1] == "‥¹é²!"
    assert mark(12) == "¹²"


def test_plain_text_goes_out_as_it_comes(
    parrot: tuple[StreamModel, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    view = PlainView()
    say(Screen(80, 24), view, ChatSession(*parrot))  # type: ignore[arg-type]
    assert capsys.readouterr().out == ANSWER + "\n"
