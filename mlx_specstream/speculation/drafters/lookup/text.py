"""Where the end of a text occurred before, in O(1) per token, and with undo.

Every token leaves, for each of a few widths, a link to the last place that ended with the same
tokens (chains of such links are how LZ77 compressors find matches). What follows the text's end
is read off the places that its chains lead to, the widest first: they hold the longest matches. A
suffix automaton would find the very longest among more places than are looked at, but cannot
forget: here an edit or a rewind takes back what it takes back, token by token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

WIDTHS = (8, 4, 2, 1)
PLACES = 12  # that are looked at, the newest of the widest first
LONGEST = 32  # tokens of a match that are compared


class Occurrence(NamedTuple):
    """An earlier place of the text's end.

    tokens: the text that it is in. next: index there of what followed. period: tokens between the
    place and the end of the same text, after which what followed begins again; 0 in another text.
    length: how many tokens match, `LONGEST` at most.
    """

    tokens: list[int]
    next: int
    period: int
    length: int

    def follows(self) -> int | None:
        """Return the token that followed, None at the end of another text."""
        at = self.next
        if at >= len(self.tokens):
            if not self.period:
                return None
            at -= self.period * (1 + (at - len(self.tokens)) // self.period)
        return self.tokens[at]

    def after(self) -> Occurrence:
        """Return the occurrence, longer by the token that followed."""
        return Occurrence(self.tokens, self.next + 1, self.period, self.length + 1)


class TextIndex:
    """A text that grows and shrinks at its end, and where its end occurred before.

    start: position of its first token in the conversation; what stands before is not known.
    An interrupt may tear the links, which outlive the answer; they are made anew then.
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.tokens: list[int] = []
        self._newest: list[dict[int, int]] = [{} for _ in WIDTHS]
        self._earlier: list[list[int]] = [[] for _ in WIDTHS]
        self._torn = False  # or being changed

    @property
    def end(self) -> int:
        """Return the position behind the last token."""
        return self.start + len(self.tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        self._mend()
        text, self._torn = self.tokens, True
        for token in tokens:
            text.append(token)
            at = len(text) - 1
            for width, newest, earlier in zip(WIDTHS, self._newest, self._earlier, strict=True):
                key = hash(tuple(text[-width:]))  # of fewer tokens at the text's beginning
                earlier.append(newest.get(key, -1))
                newest[key] = at
        self._torn = False

    def truncate(self, end: int) -> None:
        """Forget the tokens from position `end` on."""
        self._mend()
        self._torn = True
        while self.tokens and self.end > end:
            for width, newest, earlier in zip(WIDTHS, self._newest, self._earlier, strict=True):
                key, before = hash(tuple(self.tokens[-width:])), earlier.pop()
                if before < 0:
                    del newest[key]
                else:
                    newest[key] = before
            self.tokens.pop()
        self._torn = False
        if not self.tokens:
            self.start = min(self.start, end)

    def _mend(self) -> None:
        """Make links for the tokens as they are, if a change was interrupted."""
        if self._torn:
            whole = TextIndex(self.start)
            whole.extend(self.tokens)
            self._newest, self._earlier, self._torn = whole._newest, whole._earlier, False

    def occurrences(self) -> list[Occurrence]:
        """Return the earlier places of the text's end, at most `PLACES`, longest matches first."""
        text = self.tokens
        last = len(text) - 1
        places: dict[int, int] = {}
        for earlier in self._earlier:
            place = earlier[last] if last >= 0 else -1
            while place >= 0 and len(places) < PLACES:
                if place not in places:
                    length = matching(text, place, text)
                    if length:  # else another end had the same hash
                        places[place] = length
                place = earlier[place]
        found = [Occurrence(text, p + 1, last - p, length) for p, length in places.items()]
        return sorted(found, key=lambda one: -one.length)


def matching(tokens: list[int], place: int, text: list[int]) -> int:
    """Return how many tokens up to `place` of one text are those at the end of another, up to `LONGEST`."""
    most, length, last = min(LONGEST, place + 1, len(text)), 0, len(text) - 1
    while length < most and tokens[place - length] == text[last - length]:
        length += 1
    return length
