"""A terminal for tests: the few control sequences a live region uses, on a screen of text.

Everything else that begins with an escape is an error, colours aside.
"""

from __future__ import annotations

import re

from rich.cells import cell_len

_SEQUENCE = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])")


class Screen:
    """Rows of text below a scrollback; `width` cells wide, `height` rows."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height
        self.rows: list[str] = [""]
        self.row = 0
        self.column = 0
        self.top = 0  # first row on the screen; above is scrollback
        self.cursor_shown = True

    def write(self, text: str) -> int:
        place = 0
        while place < len(text):
            if text[place] == "\x1b":
                found = _SEQUENCE.match(text, place)
                assert found, f"unknown sequence at {text[place : place + 10]!r}"
                self._control(found[1], found[2])
                place = found.end()
                continue
            self._put(text[place])
            place += 1
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return "\n".join(row.rstrip() for row in self.rows).rstrip("\n")

    def _control(self, numbers: str, letter: str) -> None:
        if letter == "m":
            return
        if letter == "A":
            self.row = max(self.top, self.row - int(numbers or 1))
        elif letter == "K":
            assert numbers == ""
            self.rows[self.row] = _cells(self.rows[self.row], self.column)
        elif letter == "J":
            assert numbers == ""
            self.rows[self.row] = _cells(self.rows[self.row], self.column)
            del self.rows[self.row + 1 :]
        elif (numbers, letter) in (("?25", "l"), ("?25", "h")):
            self.cursor_shown = letter == "h"
        else:
            raise AssertionError(f"unknown sequence {numbers}{letter}")

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row, self.column = self.row + 1, 0
            if self.row == len(self.rows):
                self.rows.append("")
            self.top = max(self.top, self.row - self.height + 1)
        else:
            assert character.isprintable() or cell_len(character) == 0, repr(character)
            before = _cells(self.rows[self.row], self.column)
            after = self.rows[self.row][len(before) + 1 :] if cell_len(character) else ""
            self.rows[self.row] = before + character + after
            self.column += cell_len(character)
            assert self.column <= self.width, f"a line runs over the edge: {self.rows[self.row]!r}"


def _cells(text: str, count: int) -> str:
    """Return the beginning of `text` that is `count` cells wide."""
    kept, used = "", 0
    for character in text:
        if used + cell_len(character) > count:
            break
        kept += character
        used += cell_len(character)
    return kept + " " * (count - used)
