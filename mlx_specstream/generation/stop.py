"""Stop strings in text that arrives in pieces.

Text that could still become a stop string is held back until it is decided. Feeding the same
text in other pieces changes nothing: the stop string that is complete first ends the text.

    stop "###"     fed     "a#"   "#b"   "##"   "#c"
                   given   "a"    "##b"  ""     ""  and stopped
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from ..errors import OptionError, shown


class StopStrings:
    """Finds the first of some strings in a text and holds back what may be its beginning.

    found: the string that ended the text.

    Raises:
        OptionError: a stop string is empty or no string.
    """

    def __init__(self, strings: str | Sequence[str] | None = ()) -> None:
        given: Any = (strings,) if isinstance(strings, str) else strings or ()
        sequence = isinstance(given, Sequence | Set) and not isinstance(given, bytes)
        if not sequence or not all(isinstance(string, str) and string for string in given):
            raise OptionError(
                f"stop strings must be strings of at least one character, got {shown(strings)}."
            )
        self.strings: tuple[str, ...] = tuple(given)
        self.held = ""
        self.found: str | None = None

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that is decided now, and whether a stop string ended it."""
        before, behind = self.cut(text)
        return before, behind is not None

    def cut(self, text: str) -> tuple[str, str | None]:
        """Return the text that is decided now, and what is behind the string that ended it, if any."""
        text = self.held + text
        ends = [
            (start + len(string), start, string)
            for string in self.strings
            if (start := text.find(string)) >= 0
        ]
        if ends:
            self.held = ""
            end, start, self.found = min(ends)
            return text[:start], text[end:]
        kept = len(text) - self._undecided(text)
        self.held = text[kept:]
        return text[:kept], None

    def flush(self) -> str:
        """Return what was held back: the text is over, so no stop string will be completed."""
        held, self.held = self.held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        longest = max((len(string) - 1 for string in self.strings), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self.strings):
                return length
        return 0
