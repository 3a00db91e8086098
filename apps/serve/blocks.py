"""An answer as blocks that follow one another: thoughts, text and calls.

    passes    "Let"  " me see."  call(add)
    blocks    [text            ] [call   ]
    steps     open grow  grow  close open grow close

Blank text alone opens no block: the line break between two calls is not a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from .replies import Delta
from .request import Piece
from .tool_calls import Call

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """A part of an answer as it grows; of a call, `text` is its arguments."""

    index: int
    kind: Kind
    call: Call | None = None
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    whole: bool = False


@dataclass(frozen=True)
class Step:
    """What happens to a block; `text` and `pieces` are what it grows by."""

    kind: Literal["open", "grow", "close"]
    block: Block
    text: str = ""
    pieces: tuple[Piece, ...] = ()


class Blocks:
    """The blocks of one answer, fed with what its passes add."""

    def __init__(self) -> None:
        self.made: list[Block] = []
        self._blank = ""  # text that may yet begin a block
        self._pieces: list[Piece] = []  # tokens whose text is held back

    def add(self, delta: Delta) -> Iterator[Step]:
        """Take in a pass; yield what it does to the blocks."""
        over = delta.finish_reason is not None
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning)
        self._pieces += delta.pieces
        yield from self._text(delta.text, last=over and not delta.calls)
        for call in delta.calls:
            yield from self._close()
            yield self._open("call", call)
            yield from self._grow("call", call.arguments)
            yield from self._close()
            self._blank = ""
        if over:
            yield from self._close()

    def _text(self, text: str, last: bool) -> Iterator[Step]:
        """Grow a text; an answer without anything else has one, be it empty."""
        text = self._blank + text
        writing = bool(self.made) and self.made[-1].kind == "text" and not self.made[-1].whole
        if writing or text.strip() or (last and not self.made):
            self._blank = ""
            if text or not writing:
                yield from self._grow("text", text)
        else:
            self._blank = text

    def _grow(self, kind: Kind, text: str) -> Iterator[Step]:
        if not self.made or self.made[-1].whole or self.made[-1].kind != kind:
            yield from self._close()
            yield self._open(kind)
        block = self.made[-1]
        pieces = tuple(self._pieces) if kind == "text" else ()
        self._pieces = []
        block.text += text
        block.pieces += pieces
        if text or pieces:
            yield Step("grow", block, text, pieces)

    def _open(self, kind: Kind, call: Call | None = None) -> Step:
        self.made.append(Block(len(self.made), kind, call))
        return Step("open", self.made[-1])

    def _close(self) -> Iterator[Step]:
        if self.made and not self.made[-1].whole:
            self.made[-1].whole = True
            yield Step("close", self.made[-1])
