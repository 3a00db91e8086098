"""Thoughts in the terminal chat: dimmed, folded or not asked for, and never part of the answer."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_specstream import load
from mlx_specstream.apps.chat import app, commands
from mlx_specstream.apps.chat import view as view_module
from mlx_specstream.apps.chat.autosave import Autosave
from mlx_specstream.apps.chat.chat import Chat
from mlx_specstream.apps.chat.session import ChatSession
from mlx_specstream.apps.chat.settings import Settings
from mlx_specstream.apps.chat.view import PlainView, TerminalView
from mlx_specstream.apps.conversation import Conversation
from mlx_specstream.apps.saving import load_conversation
from tests.apps.parrot import save_parrot
from tests.apps.screen import Screen
from tests.apps.test_commands import Lines, written
from tests.apps.test_view import console_for

THOUGHT, ANSWER = "Is it *so*?\n\nIt may well be.", "Yes, **it is**."
OFF = "{% if enable_thinking is defined and not enable_thinking %}<system>off{% endif %}"


@pytest.fixture
def thinker(tmp_path: Path) -> tuple[Any, Any]:
    """A model that thinks before it answers, with the marks that mlx-lm would have found."""
    text = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
    model, tokenizer = load(str(save_parrot(tmp_path / "thinker", text)))
    tokenizer._think_start, tokenizer._think_end = "<think>", "</think>"
    tokenizer._think_start_tokens = tokenizer._think_end_tokens = (9999,)
    tokenizer.chat_template = OFF + tokenizer.chat_template
    return model, tokenizer


@pytest.fixture
def chat(thinker: tuple[Any, Any]) -> Chat:
    view = PlainView(io.StringIO(), io.StringIO())
    return Chat(ChatSession(*thinker), view, Autosave("thinker", automatic=True), interactive=True)


def answered(session: ChatSession, view: TerminalView, **options: bool) -> Iterator[None]:
    """Answer on a screen, token by token."""
    conversation = Conversation()
    conversation.ask("so?")
    shown = view.answer(lambda _: ["status"], None, 2, **options)
    for _ in session.answer(conversation):
        assert session.current is not None
        shown.feed(session.current)
        yield
    shown.finish()


@pytest.mark.parametrize("width", [20, 80])
def test_thoughts_are_dimmed_above_the_answer(thinker: tuple[Any, Any], width: int) -> None:
    screen = Screen(width, 24)
    view = TerminalView(console_for(screen), screen)  # type: ignore[arg-type]
    list(answered(ChatSession(*thinker), view))
    lines = screen.text.splitlines()
    assert lines == ["Is it *so*?", "", "It may well be.", "", "Yes, it is."]


def test_thoughts_have_a_style_of_their_own(chat: Chat) -> None:
    out = io.StringIO()
    console = console_for(Screen(80, 24))
    console.file = out
    list(answered(chat.session, TerminalView(console, out)))
    assert "\x1b[2;3mIs it *so*?" in out.getvalue()
    assert "\x1b[2;3mYes" not in out.getvalue()


def test_hidden_thoughts_are_one_line(
    thinker: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_module, "FRAME_S", 0.0)
    screen = Screen(80, 24)
    view = TerminalView(console_for(screen), screen)  # type: ignore[arg-type]
    session = ChatSession(*thinker)
    seen = [screen.text for _ in answered(session, view, hides_thoughts=True)]
    assert not any("Is it" in text for text in seen)
    assert any(text.startswith("(thought: ") and "Yes" not in text for text in seen), (
        "a sign of life"
    )
    assert session.reply is not None
    count = session.reply.thought_tokens
    assert count > 3
    assert screen.text == f"(thought: {count} tokens)\n\nYes, it is."


def test_a_thought_is_kept_beside_the_answer(chat: Chat) -> None:
    app.run(chat, Lines("so?"))
    (exchange,) = chat.session.conversation.exchanges
    assert (exchange.answer, exchange.thought) == (ANSWER, THOUGHT)
    assert chat.session.conversation.messages()[-1] == {
        "role": "assistant",
        "content": ANSWER,
        "reasoning_content": THOUGHT,
    }
    assert chat.autosave.own is not None
    assert load_conversation(chat.autosave.own) == chat.session.conversation
    assert isinstance(chat.view, PlainView)
    assert isinstance(chat.view.out, io.StringIO)
    assert chat.view.out.getvalue() == ANSWER + "\n", "a pipe gets the answer alone"
    assert THOUGHT in written(chat)
    before = written(chat).count(THOUGHT)
    commands.run(chat, "/list")
    assert written(chat).count(THOUGHT) == before + 1
    commands.run(chat, "/set thinking hidden")
    commands.run(chat, "/list")
    app.run(chat, Lines("again"))
    assert written(chat).count(THOUGHT) == before + 1


def test_thinking_off_is_told_to_the_template(chat: Chat) -> None:
    messages = [{"role": "user", "content": "so?"}]
    usual = chat.session.encode(messages)
    commands.run(chat, "/set thinking off")
    assert chat.session.encode(messages) != usual
    commands.run(chat, "/set thinking on")
    assert chat.session.encode(messages) == usual
    assert "(set, but" not in written(chat)


def test_a_template_that_knows_no_thinking_off_says_so(chat: Chat) -> None:
    template = chat.session.tokenizer.chat_template
    chat.session.tokenizer.chat_template = template.removeprefix(OFF)
    commands.run(chat, "/set thinking on")
    assert "(set, but" not in written(chat)
    commands.run(chat, "/set thinking off")
    assert "no way to ask for no thoughts" in written(chat)


def test_cut_inside_a_thought(chat: Chat) -> None:
    chat.session.use(Settings(max_tokens=5))
    app.run(chat, Lines("so?"))
    (exchange,) = chat.session.conversation.exchanges
    assert exchange.answer == ""
    assert exchange.thought
    assert "cut while it was thinking" in written(chat)


def test_a_model_without_thoughts_says_so(parrot: tuple[Any, Any]) -> None:
    view = PlainView(io.StringIO(), io.StringIO())
    chat = Chat(ChatSession(*parrot), view, Autosave("parrot", automatic=False))
    commands.run(chat, "/set thinking hidden")
    assert "does not think" in written(chat)
