"""Markdown that arrives in pieces: blocks that are complete, and the one that is still growing.

    # Title        ┐
                   ├ complete: nothing that follows can change how it looks
    A paragraph.   ┘
    - a list       ┐ growing: rendered again with every piece
    - of th        ┘

Only whole lines decide that a block is complete, for half a line may still become anything.
"""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.markdown import Markdown

CODE_THEME = "ansi_dark"  # the terminal's own colours, without a background

# HTML and images are shown as they were written: rich would leave out the one and the address
# of the other.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
_PARSER.disable("image")


class AnswerMarkdown(Markdown):
    """Markdown as a chat shows it: nothing left out, lines broken where the model broke them."""

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme=CODE_THEME, justify="default", hyperlinks=False)
        self.markup = text
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            _keep_line_breaks(token)


class BlockSplitter:
    """Cuts a growing text into complete blocks; `rest` is what is not complete yet."""

    def __init__(self) -> None:
        self.rest = ""

    def feed(self, text: str) -> list[str]:
        """Add `text` and return the blocks that are complete now."""
        self.rest += text
        if "\n" not in text:
            return []
        whole = self.rest[: self.rest.rfind("\n") + 1]
        starts = block_starts(whole)
        if len(starts) < 2:
            return []
        lines = self.rest.split("\n")
        self.rest = "\n".join(lines[starts[-1] :])
        ends = starts[1:]
        return ["\n".join(lines[a:b]) for a, b in zip(starts, ends, strict=False)]


def block_starts(text: str) -> list[int]:
    """Return the first lines (from 0) of the blocks at the top level."""
    return [
        token.map[0]
        for token in _PARSER.parse(text)
        if token.level == 0 and token.nesting >= 0 and token.map is not None
    ]


def _keep_line_breaks(token: Token) -> None:
    """Make a line break of every line end within a paragraph."""
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"
