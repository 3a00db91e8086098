r"""Thoughts and content told apart, in an answer that arrives in pieces.

    the model writes    <think>\nIs it?\n</think>\n\nYes.
    thought             Is it?
    content             Yes.

Which marks a model uses is what mlx-lm found in its vocabulary. Many chat templates open the
thought themselves, so the answer begins inside it: the prompt's ids tell. The line breaks next to
a mark belong to it, as chat templates write them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..generation.stop import StopStrings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class ThoughtMarks:
    """What a model writes around its thoughts, as text and as token ids; `ends`: of a turn."""

    start: str
    end: str
    start_tokens: tuple[int, ...] = ()
    end_tokens: tuple[int, ...] = ()
    ends: Collection[int] = ()

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper) -> ThoughtMarks | None:
        """Return what mlx-lm found in the tokenizer's files, None for a model without thoughts."""
        if not tokenizer.has_thinking:
            return None
        return cls(
            tokenizer.think_start,
            tokenizer.think_end,
            tuple(tokenizer.think_start_tokens),
            tuple(tokenizer.think_end_tokens),
            frozenset(tokenizer.eos_token_ids),
        )

    def left_open(self, prompt: Sequence[int]) -> bool:
        """Tell whether a prompt ends inside a thought, so that the answer begins there.

        Only the newest turn counts: a thought cut off in an earlier one is over.
        """
        return self._last(prompt, self.start_tokens) > self._last(prompt, self.end_tokens)

    def closed(self, prompt: Sequence[int]) -> bool:
        """Tell whether a prompt ends behind a thought: the answer is to begin without another."""
        return self._last(prompt, self.end_tokens) > self._last(prompt, self.start_tokens)

    def _last(self, prompt: Sequence[int], mark: tuple[int, ...]) -> int:
        """Return where a mark stands last in the newest turn, -1 if it does not."""
        if not mark:
            return -1
        for place in range(len(prompt) - 1, -1, -1):
            token = prompt[place]
            if token in self.ends and place < len(prompt) - 1:
                return -1
            if token == mark[0] and tuple(prompt[place : place + len(mark)]) == mark:
                return place
        return -1


@dataclass(frozen=True)
class Segment:
    """A run of an answer's text that is either thought or content."""

    text: str
    is_thought: bool


class ThoughtSplitter:
    """Splits one answer's text; `marks` None: all of it is content.

    inside: whether what comes next belongs to a thought.
    """

    def __init__(self, marks: ThoughtMarks | None, *, inside: bool = False) -> None:
        self.inside = inside and marks is not None
        self._marks = marks
        self._mark = self._awaited()
        self._at_mark = self.inside  # nothing but line breaks since the last mark
        self._breaks = ""  # at the end of a thought so far: its end mark may follow

    @classmethod
    def after(cls, marks: ThoughtMarks | None, prompt: Sequence[int]) -> ThoughtSplitter:
        """Return the splitter of the answer to a prompt of token ids."""
        return cls(marks, inside=marks is not None and marks.left_open(prompt))

    def feed(self, text: str, *, over: bool = False) -> list[Segment]:
        """Return the text that is decided now, in order; `over`: nothing will follow."""
        found: list[Segment] = []
        rest: str | None = text
        while rest is not None and self._mark is not None:
            before, rest = self._mark.cut(rest)
            self._add(found, before)
            if rest is not None:
                self.inside = not self.inside
                self._mark = self._awaited()
                self._at_mark, self._breaks = True, ""
        if self._mark is None:
            self._add(found, text)
        elif over:
            self._add(found, self._mark.flush())
        return found

    def _awaited(self) -> StopStrings | None:
        if self._marks is None:
            return None
        return StopStrings([self._marks.end if self.inside else self._marks.start])

    def _add(self, found: list[Segment], text: str) -> None:
        """Append text without the line breaks that belong to a mark."""
        if self._at_mark:
            text = text.lstrip("\r\n")
            self._at_mark = not text
        if self.inside:
            text = self._breaks + text
            kept = text.rstrip("\r\n")
            self._breaks = text[len(kept) :]
            text = kept
        if text:
            found.append(Segment(text, self.inside))


class ContentStops:
    """Stop strings that end an answer in its content, not in its thoughts, which pass as written."""

    def __init__(self, strings: Sequence[str], marks: ThoughtMarks, *, inside: bool) -> None:
        self._marks = marks
        self._strings = StopStrings(strings).strings
        self.found: str | None = None
        self._inside = inside
        self._awaited = self._finder()

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that is decided now, and whether a stop string ended it."""
        given = ""
        while True:
            whole = self._awaited.held + text
            before, behind = self._awaited.cut(text)
            given += before
            if behind is None:
                return given, False
            found = whole[len(before) : len(whole) - len(behind)]
            if not self._inside and found in self._strings:
                self.found = found
                return given, True
            given += found
            text, self._inside = behind, not self._inside
            self._awaited = self._finder()

    def flush(self) -> str:
        """Return what was held back."""
        return self._awaited.flush()

    def _finder(self) -> StopStrings:
        marks = self._marks
        return StopStrings([marks.end] if self._inside else [*self._strings, marks.start])
