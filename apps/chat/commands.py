"""What a line that starts with a slash does.

A command changes the chat and may hand something back to the loop: a conversation whose question
waits for an answer, a question to edit, or the wish to leave.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rich.text import Text

from ...config.sampling import GREEDY_BELOW
from ...errors import OptionError
from ..conversation import Conversation
from .chat import Chat
from .drafts import drawing
from .listing import Listing
from .reports import settings_table, stats_table, token_pieces, tokens_table, why_no_drafts
from .session import ChatSession
from .settings import SETTINGS, canonical


@dataclass(frozen=True)
class Edit:
    """A question that a person wants to change."""

    number: int
    text: str


@dataclass(frozen=True)
class Leave:
    """The wish to leave."""


Outcome = Conversation | Edit | Leave | None


@dataclass(frozen=True)
class Command:
    """One command: what it takes, what it does, and what may be completed after it."""

    usage: str
    summary: str
    run: Callable[[Chat, str], Outcome]
    words: Callable[[Chat, str], list[str]] | None = None
    takes_path: bool = False


def is_command(line: str) -> bool:
    """Tell commands from text: `/word`, while `/a/path` and `//text` are text."""
    return re.match(r"/[A-Za-z?]+(\s|$)", line) is not None


def run(chat: Chat, line: str) -> Outcome:
    """Run the command in `line`.

    Raises:
        OptionError: there is no such command, or it cannot be used like this.
        SpecStreamError: it could not do its work.
    """
    found = re.match(r"/(\S+)\s*(.*)", line, re.DOTALL)
    assert found is not None
    name, argument = found[1].lower(), found[2]
    command = COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        raise OptionError(
            f"there is no command /{name}; /help lists them, and //{name} is sent as text."
        )
    return command.run(chat, argument.strip())


def _help(chat: Chat, argument: str) -> Outcome:
    name = argument.lstrip("/").lower()
    if name and name not in COMMANDS:
        raise OptionError(f"there is no command /{name}; /help lists them.")
    table = Listing()
    for key, command in COMMANDS.items():
        if name in ("", key):
            table.add_row(Text(command.usage, style="bold"), Text(command.summary))
    chat.view.show(table)
    if not name and chat.interactive:
        chat.view.note(
            "Enter sends, Alt-Enter or a backslash at the end begins a new line. Ctrl-C stops an "
            "answer, Ctrl-D leaves. //text sends /text."
        )
    return None


def _clear(chat: Chat, argument: str) -> Outcome:
    _takes_nothing("clear", argument)
    chat.replace_conversation(Conversation(chat.session.conversation.system))
    chat.autosave.start_over()
    chat.view.note("(a new conversation; /system shows the system prompt it keeps)")
    return None


def _system(chat: Chat, argument: str) -> Outcome:
    conversation = chat.session.conversation
    if not argument:
        chat.view.note(conversation.system if conversation.system else "(no system prompt)")
        return None
    chat.change_system(None if argument.lower() == "none" else argument)
    chat.view.note("(from the next answer on)")
    return None


def _set(chat: Chat, argument: str) -> Outcome:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name = canonical(name) if name else ""
    session = chat.session
    if not value.strip():
        chat.view.show(settings_table(session.settings, name))
        return None
    session.use(session.settings.changed(name, value))
    if but := _in_vain(session, name):
        chat.view.note(f"(set, but {but})")
    else:
        chat.view.note(f"({chat.described()})" if name in ("mode", "tree") else "(set)")
    return None


def _in_vain(session: ChatSession, name: str) -> str:
    """Return why a setting as it is changes nothing, "" if it may change something."""
    settings = session.settings
    if name == "thinking":
        if session.marks is None:
            return "this model does not think before it answers"
        if settings.thinking == "off" and not session.may_not_think:
            return "this model's chat template has no way to ask for no thoughts; hidden folds them"
    if name in _OF_DRAWING and settings.sampling.temp < GREEDY_BELOW:
        return "at temperature 0 the likeliest token is taken; /set temperature 0.7"
    if name in _OF_DRAFTS and settings.mode == "plain":
        return "nothing is drafted; /set mode speculative"
    return ""


_OF_DRAWING = ("top-p", "top-k", "min-p", "xtc-probability", "xtc-threshold", "seed")
_OF_DRAFTS = ("tree", "drafts", "prune", "schedule", "conditioning", "lossy-typical")


def _stats(chat: Chat, argument: str) -> Outcome:
    if argument not in ("", "again"):
        raise OptionError(f"/stats takes nothing or 'again', got {argument!r}.")
    if argument == "again" or (chat.speed is None and chat.session.reply is not None):
        chat.measure_speed()
    chat.view.show(stats_table(chat.session, chat.speed))
    return None


def _save(chat: Chat, argument: str) -> Outcome:
    if not argument:
        raise OptionError("/save needs the name of a file, for example /save sky.json.")
    path = chat.autosave.save(chat.session.conversation, argument)
    chat.view.note(f"(saved to {path})")
    return None


def _load(chat: Chat, argument: str) -> Outcome:
    if not argument:
        raise OptionError("/load needs the name of a file that /save wrote.")
    conversation = chat.autosave.load(argument)
    chat.replace_conversation(conversation)
    chat.autosave.start_over()
    count = len(chat.session.conversation.exchanges)
    if count:
        chat.show_exchange(count)
    chat.view.note(f"(loaded, {count} question{'' if count == 1 else 's'})")
    return None


def _retry(chat: Chat, argument: str) -> Outcome:
    _takes_nothing("retry", argument)
    conversation = chat.session.conversation.copy()
    conversation.retry()
    if chat.session.settings.sampling.is_greedy:
        chat.view.note("(at temperature 0 the answer stays the same; /set temperature 0.7)")
    return conversation


def _edit(chat: Chat, argument: str) -> Outcome:
    found = re.match(r"(\d{1,9})(\s+|$)", argument)
    conversation = chat.session.conversation
    number = int(found[1]) if found else len(conversation.exchanges)
    text = argument[found.end() :] if found else argument
    question = conversation.question(number)
    if not text:
        if not chat.interactive:
            raise OptionError(f"/edit {number} needs the new question after it.")
        return Edit(number, question)
    conversation = conversation.copy()
    conversation.edit(number, text)
    return conversation


def _undo(chat: Chat, argument: str) -> Outcome:
    _takes_nothing("undo", argument)
    chat.undo()
    exchanges = chat.session.conversation.exchanges
    if exchanges:
        chat.show_exchange(len(exchanges))
    chat.view.note(f"(undone; question {len(exchanges) + 1} is next)")
    return None


def _tokens(chat: Chat, argument: str) -> Outcome:
    if argument:
        chat.view.show(token_pieces(chat.session, argument))
    else:
        chat.view.show(tokens_table(chat.session))
    return None


def _draft(chat: Chat, argument: str) -> Outcome:
    if argument in ("on", "off"):
        chat.live_drafts = argument == "on"
        chat.view.note(f"(drafts {argument})")
        return None
    if argument:
        raise OptionError(f"/draft takes nothing, 'on' or 'off', got {argument!r}.")
    if chat.session.reply is None:
        raise OptionError("there is no answer yet whose drafts could be shown; ask something.")
    assert chat.session.reply.last is not None
    if not chat.session.reply.last.stats.drafted:
        chat.view.note(why_no_drafts(chat.session))
        return None
    chat.view.show(drawing(chat.draft_view(), chat.session.reply.steps, chat.num_streams))
    return None


def _list(chat: Chat, argument: str) -> Outcome:
    _takes_nothing("list", argument)
    for number in range(1, len(chat.session.conversation.exchanges) + 1):
        chat.show_exchange(number)
    if not chat.session.conversation.exchanges:
        chat.view.note("(nothing has been asked yet)")
    return None


def _quit(chat: Chat, argument: str) -> Outcome:
    del chat
    _takes_nothing("quit", argument)
    return Leave()


def _takes_nothing(name: str, argument: str) -> None:
    if argument:
        raise OptionError(f"/{name} takes nothing after it, got {argument!r}.")


def _setting_words(chat: Chat, before: str) -> list[str]:
    """Return what may follow `/set`: names, or the values of the name that is there."""
    del chat
    name, space, _ = before.lstrip().partition(" ")
    if not space:
        return list(SETTINGS)
    return [f"{name} {value}" for value in SETTINGS[name].values] if name in SETTINGS else []


def _names(chat: Chat, before: str) -> list[str]:
    del chat, before
    return list(COMMANDS)


def _fixed(*words: str) -> Callable[[Chat, str], list[str]]:
    def completions(chat: Chat, before: str) -> list[str]:
        del chat, before
        return list(words)

    return completions


def _numbers(chat: Chat, before: str) -> list[str]:
    del before
    return [str(n + 1) for n in range(len(chat.session.conversation.exchanges))]


COMMANDS: dict[str, Command] = {
    "help": Command("/help [COMMAND]", "list the commands", _help, _names),
    "retry": Command("/retry", "answer the last question again", _retry),
    "edit": Command(
        "/edit [N] [TEXT]", "change question N (the last) and go on from there", _edit, _numbers
    ),
    "undo": Command(
        "/undo", "go back to before the last answer, edit, clear, load or system prompt", _undo
    ),
    "list": Command("/list", "show the conversation", _list),
    "clear": Command("/clear", "begin a new conversation", _clear),
    "system": Command("/system [TEXT|none]", "show or change the system prompt", _system),
    "set": Command(
        "/set [NAME [VALUE]]", "show or change how answers are made", _set, _setting_words
    ),
    "draft": Command(
        "/draft [on|off]",
        "show who proposed the last answer's tokens; on: of every answer, as it comes",
        _draft,
        _fixed("on", "off"),
    ),
    "stats": Command(
        "/stats [again]",
        "figures of the last answer, speed against plain decoding",
        _stats,
        _fixed("again"),
    ),
    "tokens": Command("/tokens [TEXT]", "how full the context is, or TEXT cut up", _tokens),
    "save": Command("/save FILE", "write the conversation to a file", _save, takes_path=True),
    "load": Command("/load FILE", "go on with a saved conversation", _load, takes_path=True),
    "quit": Command("/quit", "leave (as Ctrl-D)", _quit),
}
"""Every command by name, in the order /help lists them."""

_ALIASES = {"exit": "quit", "q": "quit", "h": "help", "?": "help"}
