"""Where lines come from: a line editor at a terminal, or whatever is piped in.

At the editor Enter sends; Alt-Enter, or Enter behind a backslash, begins a new line; pasted text
stays whole. In a pipe every line is sent, a backslash at its end joins the next one to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from ...errors import DataError
from ...machine import ranks

STYLE = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "number": "bold"})


class Reader(Protocol):
    """Gives the next line that was typed."""

    def read(self, prompt: str, default: str = "") -> str:
        """Return the next text; EOFError: there is none, KeyboardInterrupt: Ctrl-C."""


class EditorReader:
    """A line editor with history, completion and a status line below it."""

    def __init__(
        self, history: Path | None, completer: Completer, status: Callable[[int], str]
    ) -> None:
        kept: History = InMemoryHistory() if history is None else FileHistory(str(history))
        self.status = status
        self.session: PromptSession[str] = PromptSession(
            history=kept,
            completer=completer,
            complete_while_typing=True,
            reserve_space_for_menu=4,
            multiline=True,
            key_bindings=_keys(),
            enable_open_in_editor=True,
            style=STYLE,
            bottom_toolbar=self._toolbar,
            prompt_continuation=_indented,
        )

    def read(self, prompt: str, default: str = "") -> str:
        try:
            return self.session.prompt([("class:number", prompt)], default=default)
        finally:  # the editor turned it off; what is pasted ahead must stay whole
            self.session.app.output.enable_bracketed_paste()
            self.session.app.output.flush()

    def _toolbar(self) -> StyleAndTextTuples:
        columns = self.session.app.output.get_size().columns
        return [("class:bottom-toolbar.text", self.status(columns - 1))]


class LineReader:
    """Lines of a stream as they are; `prompts` is where a person at a dumb terminal is asked."""

    def __init__(self, stream: TextIO | None = None, prompts: TextIO | None = None) -> None:
        self.stream = stream or sys.stdin
        self.prompts = prompts

    def read(self, prompt: str, default: str = "") -> str:
        del default
        lines: list[str] = []
        while True:
            if self.prompts is not None:
                print(" " * len(prompt) if lines else prompt, end="", file=self.prompts, flush=True)
            try:
                line = self.stream.readline()
            except UnicodeDecodeError:
                raise DataError("standard input is not UTF-8 text.") from None
            if not line and not lines:
                raise EOFError
            joined = line.rstrip("\n")
            if not joined.endswith("\\") or not line:
                return "\n".join([*lines, joined])
            lines.append(joined[:-1])


class CommandCompleter(Completer):
    """Completes commands and what they take; leaves text alone.

    words: (name, argument so far) to what the argument may be. paths: commands that take a file.
    """

    def __init__(
        self, names: Iterable[str], paths: Iterable[str], words: Callable[[str, str], list[str]]
    ) -> None:
        self.names = list(names)
        self.paths = set(paths)
        self.words = words
        self.path_completer = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        before = document.text_before_cursor
        if not before.startswith("/") or "\n" in before:
            return
        name, space, argument = before[1:].partition(" ")
        if not space:
            for known in self.names:
                if known.startswith(name.lower()):
                    yield Completion(f"/{known}", start_position=-len(before))
        elif name in self.paths:
            inner = Document(argument, len(argument))
            yield from self.path_completer.get_completions(inner, complete_event)
        else:
            for word in self.words(name, argument):
                if word.startswith(argument) and word != argument:
                    yield Completion(word, start_position=-len(argument))


def _indented(width: int, line: int, wrapped: int) -> str:
    """Return what stands before the second and later lines of a text."""
    del line, wrapped
    return " " * width


class SharedReader:
    """The leader's lines, in every process that decodes together."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def read(self, prompt: str, default: str = "") -> str:
        line = ""
        if not ranks.is_follower():
            try:
                line = "=" + self.reader.read(prompt, default)
            except (EOFError, KeyboardInterrupt):
                line = "."
        line = ranks.told(line.encode()).decode()
        if line == ".":
            raise EOFError
        return line[1:]


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
