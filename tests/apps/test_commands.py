"""Commands, settings and what a line is taken for."""

from __future__ import annotations

import io
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mlx_specstream import StreamModel
from mlx_specstream.apps.chat import app, commands
from mlx_specstream.apps.chat.autosave import Autosave
from mlx_specstream.apps.chat.chat import Chat, short_name
from mlx_specstream.apps.chat.commands import COMMANDS, Edit, Leave
from mlx_specstream.apps.chat.session import ChatSession
from mlx_specstream.apps.chat.settings import SETTINGS, Settings
from mlx_specstream.apps.chat.view import PlainView
from mlx_specstream.apps.conversation import Conversation, Exchange
from mlx_specstream.apps.saving import load_conversation
from mlx_specstream.config import PruneSpec, TreeSpec, TypicalSpec
from mlx_specstream.errors import OptionError
from tests.apps.parrot import ANSWER


@pytest.fixture
def chat(parrot: tuple[StreamModel, Any]) -> Chat:
    """A chat that writes into memory; `written` reads it."""
    session = ChatSession(*parrot, conversation=Conversation(None, [Exchange("a", "A")]))
    return Chat(
        session,
        PlainView(io.StringIO(), io.StringIO()),
        Autosave("parrot", automatic=True),
        interactive=True,
    )


def written(chat: Chat) -> str:
    """Return what the chat has written, remarks behind the rest."""
    view = chat.view
    assert isinstance(view, PlainView)
    assert isinstance(view.out, io.StringIO)
    assert isinstance(view.err, io.StringIO)
    return view.out.getvalue() + view.err.getvalue()


class Lines:
    """A reader of given lines; an exception stands for a key."""

    def __init__(self, *lines: str | BaseException) -> None:
        self.lines = list(lines)
        self.defaults: list[str] = []

    def read(self, prompt: str, default: str = "") -> str:
        del prompt
        self.defaults.append(default)
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/help", True),
        ("/set x", True),
        ("/system\nbe kind", True),
        ("/?", True),
        ("/usr/bin is what", False),
        ("//help", False),
        ("help", False),
        ("/ x", False),
    ],
)
def test_commands_are_told_from_text(line: str, found: bool) -> None:
    assert commands.is_command(line) == found


def test_every_command_explains_itself(chat: Chat) -> None:
    commands.run(chat, "/help /edit")
    assert "/retry" not in written(chat)
    commands.run(chat, "/help")
    assert all(command.usage.split()[0] in written(chat) for command in COMMANDS.values())


def test_editing_hands_the_question_back(chat: Chat) -> None:
    assert commands.run(chat, "/edit") == Edit(1, "a")
    assert commands.run(chat, "/edit 1") == Edit(1, "a")
    changed = commands.run(chat, "/edit 1 b\nc")
    assert isinstance(changed, Conversation)
    assert changed.exchanges == [Exchange("b\nc")]
    changed = commands.run(chat, "/edit in other words")
    assert isinstance(changed, Conversation)
    assert changed.exchanges == [Exchange("in other words")]
    assert chat.session.conversation.exchanges == [Exchange("a", "A")]
    assert isinstance(commands.run(chat, "/quit"), Leave)


def test_a_line_editors_keys(chat: Chat) -> None:
    reader = Lines(
        "/edit 1", KeyboardInterrupt(), KeyboardInterrupt(), "/edit 1", "b", "", EOFError()
    )
    assert app.run(chat, reader) == 0
    assert reader.defaults == ["", "a", "", "", "a", "", ""]
    assert [e.question for e in chat.session.conversation.exchanges] == ["b"]
    assert chat.autosave.own is not None
    assert "(nothing was changed)" in written(chat)
    assert app.LEAVE_HINT in written(chat)


def test_the_speed_is_measured_once_for_each_setting(chat: Chat) -> None:
    app.run(chat, Lines("one"))
    assert list(chat.speeds), "measured when idle"
    before = dict(chat.speeds)
    app.run(chat, Lines("two"))
    assert chat.speeds == before
    commands.run(chat, "/set tree chain")
    assert chat.speed is None
    commands.run(chat, "/stats")
    assert chat.speed is not None
    assert "× plain decoding" in written(chat)
    commands.run(chat, "/set mode plain")
    app.run(chat, Lines("three"))
    assert chat.session.conversation.exchanges[-1].answer == ANSWER
    assert chat.status(chat.session.reply)[1] == "plain"


def test_undo_goes_back_one_change_at_a_time(chat: Chat) -> None:
    first = chat.session.conversation
    app.run(chat, Lines("one"))
    own = chat.autosave.own
    assert own is not None
    commands.run(chat, "/system be kind")
    app.run(chat, Lines("/edit 1 other"))
    commands.run(chat, "/clear")
    assert chat.autosave.own is None

    def questions() -> list[str]:
        return [e.question for e in chat.session.conversation.exchanges]

    for wanted, system in (
        (["other"], "be kind"),
        (["a", "one"], "be kind"),
        (["a", "one"], None),
        (["a"], None),
    ):
        commands.run(chat, "/undo")
        assert (questions(), chat.session.conversation.system) == (wanted, system)
    assert chat.session.conversation == first
    with pytest.raises(OptionError, match="nothing to undo"):
        commands.run(chat, "/undo")
    app.run(chat, Lines("two"))
    assert questions() == ["a", "two"]
    assert chat.session.conversation.exchanges[-1].answer == ANSWER
    commands.run(chat, "/undo")
    kept = load_conversation(chat.autosave.own) if chat.autosave.own else None
    assert kept is None or kept == chat.session.conversation, "what is resumed is what is left"


def test_undo_of_the_first_question_is_kept_too(chat: Chat) -> None:
    chat.session.conversation = Conversation()
    app.run(chat, Lines("one", "two"))
    own = chat.autosave.own
    assert own is not None
    commands.run(chat, "/undo")
    assert load_conversation(own) == chat.session.conversation


def test_drafts_of_a_plain_answer(chat: Chat) -> None:
    commands.run(chat, "/set mode plain")
    app.run(chat, Lines("one", "/draft"))
    assert written(chat).count("/set mode speculative, then /retry") == 1
    assert "main stream" not in written(chat)
    app.run(chat, Lines("/draft on", "two"))
    assert written(chat).count("/set mode speculative, then /retry") == 2, "said unasked"
    app.run(chat, Lines("/set mode speculative", "/set tree chain", "/retry", "/draft"))
    assert written(chat).count("main stream") == 3
    assert written(chat).count("decoded plainly") == 2


def test_parts_of_characters_say_so(chat: Chat) -> None:
    commands.run(chat, "/tokens aé你!")
    assert "7: a|‥|é|‥|‥|你|!" in written(chat)


@pytest.mark.parametrize("width", [20, 40, 80, 120])
@pytest.mark.parametrize("line", ["/help", "/set", "/stats", "/tokens"])
def test_names_are_whole_on_any_screen(chat: Chat, width: int, line: str) -> None:
    app.run(chat, Lines("one"))
    chat.view.console.width = width
    assert isinstance(chat.view, PlainView)
    chat.view.out = io.StringIO()
    commands.run(chat, line)
    names = {
        "/help": [command.usage for command in COMMANDS.values()],
        "/set": list(SETTINGS),
        "/stats": ["prompt", "reading", "writing", "memory"],
        "/tokens": ["asked", "answered"],
    }[line]
    text = chat.view.out.getvalue()
    for name in names:
        assert name in text, text
    assert max(len(row) for row in text.splitlines()) <= width


def test_completion(chat: Chat) -> None:
    def completed(text: str) -> list[str]:
        found = app.completer(chat).get_completions(Document(text), CompleteEvent())
        return [completion.text for completion in found]

    assert completed("/se") == ["/set"]
    assert set(completed("/")) == {f"/{name}" for name in COMMANDS}
    assert completed("/set te") == ["temperature"]
    assert completed("/set mode p") == ["mode plain"]
    assert completed("/edit ") == ["1"]
    assert completed("/draft o") == ["on", "off"]
    assert completed("hello /se") == []
    assert completed("/set a\nb") == []


def test_settings_are_read_and_shown() -> None:
    settings = Settings()
    for name, value in [
        ("temp", "0.5"),
        ("TOP_P", "0.9"),
        ("top-k", "40"),
        ("min-p", "0.1"),
        ("xtc-probability", "0.5"),
        ("xtc-threshold", "0.2"),
        ("repetition-penalty", "1.1"),
        ("presence-penalty", "-0.5"),
        ("frequency-penalty", "0.25"),
        ("lossy-typical", "0.2"),
        ("seed", "7"),
        ("max-tokens", "-1"),
        ("mode", "plain"),
        ("thinking", "hidden"),
        ("tree", "3^2"),
        ("prune", "8:0.5"),
        ("schedule", "inline"),
        ("conditioning", "off"),
    ]:
        settings = settings.changed(name, value)
    assert (settings.sampling.temp, settings.sampling.top_p) == (0.5, 0.9)
    assert (settings.sampling.top_k, settings.sampling.min_p) == (40, 0.1)
    assert (settings.sampling.seed, settings.max_tokens, settings.mode) == (7, -1, "plain")
    assert settings.decode.tree == TreeSpec.parse("3^2")
    assert settings.decode.prune == PruneSpec(8, 0.5)
    assert not settings.decode.use_conditioner
    assert settings.decode.typical == TypicalSpec(0.2, 0.3)
    assert (settings.sampling.xtc_probability, settings.sampling.xtc_threshold) == (0.5, 0.2)
    assert settings.sampling.repetition_penalty == 1.1
    assert len(settings.sampling.processors(256)) == 3
    assert Settings().sampling.processors(256) == []
    shown = {name: value for name, value, _ in settings.rows()}
    assert shown["tree"] == "3^2"
    assert shown["prune"] == "8:0.5"
    assert shown["conditioning"] == "off"
    assert settings.changed("seed", "none").sampling.seed is None
    for name, value in shown.items():
        assert settings.changed(name, value) == settings, "what is shown can be typed"


def test_a_setting_that_changes_nothing_yet_says_so(chat: Chat) -> None:
    for lines, remark in (
        (["/set top-p 0.9"], "at temperature 0"),
        (["/set seed 3"], "at temperature 0"),
        (["/set temperature 0.7", "/set top-p 0.8"], ""),
        (["/set mode plain", "/set prune 8"], "/set mode speculative"),
        (["/set mode speculative", "/set prune none"], ""),
        (["/set max-tokens 9"], ""),
    ):
        before = written(chat)
        for line in lines:
            commands.run(chat, line)
        said = written(chat).removeprefix(before)
        assert ("(set, but" in said) == bool(remark), lines
        assert remark in said


@pytest.mark.parametrize("name", SETTINGS)
def test_nonsense_is_refused(name: str) -> None:
    for text in ("-5", "what", "", "nan" if name != "mode" else "x"):
        if text == "-5" and name in ("presence-penalty", "frequency-penalty"):
            continue  # tokens may be rewarded for having occurred
        with pytest.raises(OptionError):
            Settings().changed(name, text)


def test_models_are_named_without_their_folder(tmp_path: Any) -> None:
    assert short_name(str(tmp_path)) == tmp_path.name
    assert short_name("owner/model") == "owner/model"
