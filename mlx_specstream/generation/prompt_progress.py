"""How much of a long prompt is read, on a line of the terminal that the answer then takes."""

from __future__ import annotations

from typing import TextIO

LONG_PROMPT = 64  # tokens to read that are worth a line
_ERASE_LINE = "\r\x1b[K"


class PromptProgress:
    """Shows "reading 512/4000 tokens" until the prompt is read; nothing if `file` is no terminal."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.shown = False

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` tokens are read."""
        if total < LONG_PROMPT or not self.file.isatty():
            return
        if done >= total:
            self.clear()
            return
        self.file.write(f"{_ERASE_LINE}reading {done}/{total} tokens")
        self.file.flush()
        self.shown = True

    def clear(self) -> None:
        """Take the line away."""
        if self.shown:
            self.file.write(_ERASE_LINE)
            self.file.flush()
        self.shown = False
