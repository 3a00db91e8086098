"""What a model may write on a screen: text, never instructions to the terminal."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
# Characters that reorder or hide text; joiners and variation selectors, which emoji need, stay.
_DIRECTION = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def printable(text: str) -> str:
    """Return `text` with control characters replaced, so that no escape sequence survives."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text.replace("\r", ""))


def counted(number: int, noun: str) -> str:
    """Return "1 token", "2 tokens"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def on_one_line(text: str) -> str:
    """Return `text` on one line, its line ends and tabs visible."""
    return printable(text.replace("\n", "⏎").replace("\t", "⇥"))


def _shown(character: str) -> str:
    if character in _KEPT:
        return character
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # ␛ for escape
    bad = unicodedata.category(character) in ("Cc", "Cs") or ord(character) in _DIRECTION
    return "\N{REPLACEMENT CHARACTER}" if bad else character
