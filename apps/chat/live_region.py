"""The part of the terminal that is drawn again and again, at the bottom of what was printed.

Lines are only written where they changed, and never erased before they are written, so nothing
flickers. Lines that are final are printed once, above, and belong to the scrollback.

    │ printed: final, scrolls away      │
    │ live line 0                       │ ◄─ the cursor goes up to the first line that changed
    │ live line 1                       │
    │ status                            │ ◄─ and rests behind the last one
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, RenderableType
from rich.segment import Segment, SegmentLines
from rich.text import Text

_ERASE_LINE = "\x1b[K"
_ERASE_BELOW = "\x1b[J"
_HIDE_CURSOR = "\x1b[?25l"
_SHOW_CURSOR = "\x1b[?25h"


class LiveRegion:
    """Draws lines that change, and lines that do not, on one terminal.

    Lines are strings without line ends, with their own colours, narrower than the terminal.
    """

    def __init__(self, console: Console, file: TextIO) -> None:
        self.console = console
        self.file = file
        self.lines: list[str] = []
        self.width = console.width
        self.shown = False

    def update(self, final: Sequence[str], live: Sequence[str]) -> None:
        """Print `final` lines above and draw `live` ones below, all of them in one write."""
        wanted = [*final, *live]
        self._measure()
        kept = 0
        while kept < min(len(self.lines), len(wanted)) and self.lines[kept] == wanted[kept]:
            kept += 1
        if kept == len(self.lines) == len(wanted):
            self.lines = list(live)
            return
        output = [] if self.shown else [_HIDE_CURSOR]
        self.shown = True
        if up := sum(self._rows(line) for line in self.lines[kept:]):
            output.append(f"\x1b[{up}A")
        output += [f"{line}{_ERASE_LINE}\n" for line in wanted[kept:]]
        if len(self.lines) > len(wanted) or self._wrapped():
            output.append(_ERASE_BELOW)
        self.file.write("\r" + "".join(output))
        self.file.flush()
        self.lines = list(live)

    def close(self, final: Sequence[str] = ()) -> None:
        """Print `final` lines in place of the live ones and give the cursor back."""
        self.update(final, ())
        self.lines = []
        if self.shown:
            self.file.write(_SHOW_CURSOR)
            self.file.flush()
        self.shown = False

    def _measure(self) -> None:
        """Take note of the terminal's width; a changed one has wrapped what is on the screen."""
        self.width = self.console.width

    def _rows(self, line: str) -> int:
        """Return how many rows of the terminal a line takes since it was resized."""
        return max(1, -(-Text.from_ansi(line).cell_len // max(1, self.width)))

    def _wrapped(self) -> bool:
        return any(self._rows(line) > 1 for line in self.lines)


def render(console: Console, renderable: RenderableType, width: int) -> list[str]:
    """Return a renderable as lines for a terminal, colours included, no blanks at their ends."""
    rows = console.render_lines(renderable, console.options.update(width=width), pad=False)
    with console.capture() as capture:
        lines = [_trimmed(row) for row in rows]
        console.print(SegmentLines(lines, new_lines=True), end="", crop=False)
    return capture.get().split("\n")[:-1]


def _trimmed(row: list[Segment]) -> list[Segment]:
    """Return a row without the blanks at its end, unless they can be seen."""
    row = [segment for segment in row if not segment.control]
    while row:
        text, style, _ = row[-1]
        if style is not None and (style.bgcolor or style.underline or style.reverse):
            return row
        if stripped := text.rstrip(" "):
            return [*row[:-1], Segment(stripped, style)]
        row = row[:-1]
    return row
