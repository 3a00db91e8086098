"""The loop: read a line, do what it says, until there are no more."""

from __future__ import annotations

from ... import SpecStreamError
from ..conversation import Conversation
from . import commands
from .chat import Chat, one_sentence
from .commands import COMMANDS, Edit, Leave
from .reader import CommandCompleter, Reader

LEAVE_HINT = "(Ctrl-D or /quit leaves)"
# Lines of a pipe that mlx_lm.chat takes for commands. At a line editor they are text.
_MLX_LM_WORDS = {"q": "/quit", "r": "/clear", "h": "/help"}


def run(chat: Chat, reader: Reader, *, is_attended: bool = False) -> int:
    """Chat until the input ends; return 0, or 2 if a line of a pipe could not be used.

    is_attended: a person sits there, though at no line editor: Ctrl-C does not end the chat.
    """
    status = 0
    while True:
        number = len(chat.session.conversation.exchanges) + 1
        try:
            line = reader.read(f"{number} › ")
            if not _take(chat, reader, line):
                break
        except EOFError:
            break
        except KeyboardInterrupt:
            if not (chat.interactive or is_attended):
                raise
            chat.view.note(LEAVE_HINT)
        except SpecStreamError as error:
            chat.view.error(one_sentence(error))
            status = 0 if chat.interactive else 2
    return status


def completer(chat: Chat) -> CommandCompleter:
    """Return what completes a line of this chat."""

    def words(name: str, before: str) -> list[str]:
        command = COMMANDS.get(name)
        return command.words(chat, before) if command and command.words else []

    return CommandCompleter(
        COMMANDS, (name for name, command in COMMANDS.items() if command.takes_path), words
    )


def _take(chat: Chat, reader: Reader, line: str) -> bool:
    """Do what one line says; return False if it ends the chat."""
    text = line.strip()
    if not chat.interactive:
        text = _MLX_LM_WORDS.get(line, text)
    if not text:
        return True
    if commands.is_command(text):
        outcome = commands.run(chat, text)
    else:
        outcome = chat.session.conversation.copy()
        outcome.ask(_clean(line))
    if isinstance(outcome, Leave):
        return False
    if isinstance(outcome, Edit):
        outcome = _edited(chat, reader, outcome)
    if isinstance(outcome, Conversation):
        chat.answer(outcome)
    return True


def _edited(chat: Chat, reader: Reader, edit: Edit) -> Conversation | None:
    """Let a person change a question; return the conversation that asks it, or None."""
    try:
        text = reader.read(f"edit {edit.number} › ", edit.text)
    except (EOFError, KeyboardInterrupt):
        text = ""
    if not text.strip():
        chat.view.note("(nothing was changed)")
        return None
    conversation = chat.session.conversation.copy()
    conversation.edit(edit.number, _clean(text))
    return conversation


def _clean(line: str) -> str:
    """Return a line as the model gets it: `//x` means `/x`, bytes that are no text are replaced."""
    text = line.strip("\r\n").rstrip()
    text = text[1:] if text.startswith("//") else text
    return text.encode("utf-8", "replace").decode("utf-8")
