"""Where answers and remarks go: a live terminal, or plain text for pipes and dumb terminals."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from ...generation.prompt_progress import LONG_PROMPT
from .drafts import DraftView
from .live_region import LiveRegion, render
from .markdown import AnswerMarkdown, BlockSplitter
from .session import Reply
from .status import fitted, prompt_status
from .text import counted, printable

Status = Callable[[Reply], list[str]]
THOUGHT_STYLE = "dim italic"
FRAME_S = 0.05  # at most twenty drawings a second


class AnswerView(Protocol):
    """Shows one answer as it grows."""

    def prompt(self, done: int, total: int) -> None:
        """Show how much of the prompt is read."""

    def feed(self, reply: Reply) -> None:
        """Show the answer with its newest token."""

    def finish(self) -> None:
        """Leave the answer as it is now on the screen."""


class View(Protocol):
    """Shows what a chat has to say."""

    console: Console

    def note(self, text: str) -> None:
        """Remark something."""

    def error(self, text: str) -> None:
        """Say what went wrong."""

    def show(self, what: RenderableType) -> None:
        """Show what a command found out."""

    def markdown(self, text: str) -> None:
        """Show an answer that was given earlier."""

    def thought(self, text: str) -> None:
        """Show what was thought before an earlier answer."""

    def answer(
        self,
        status: Status,
        drafts: DraftView | None,
        num_streams: int,
        *,
        hides_thoughts: bool = False,
    ) -> AnswerView:
        """Begin to show an answer, as steps if `drafts` is given."""


class TerminalView:
    """Markdown, colours and a status line, on a terminal that can move its cursor."""

    def __init__(self, console: Console, file: TextIO | None = None) -> None:
        self.console = console
        self.file = file or sys.stdout

    def note(self, text: str) -> None:
        self.show(Text(printable(text), style="dim"))

    def error(self, text: str) -> None:
        self.show(Text(printable(text), style="red"))

    def show(self, what: RenderableType) -> None:
        lines = render(self.console, what, self.console.width - 1)
        self.file.write("".join(f"{line}\n" for line in lines))
        self.file.flush()

    def markdown(self, text: str) -> None:
        splitter = BlockSplitter()
        blocks = [*splitter.feed(printable(text) + "\n"), splitter.rest]
        for block in blocks:
            lines = block_lines(self.console, block, self.console.width - 1)
            self.file.write("".join(f"{line}\n" for line in [*lines, ""]))
        self.file.flush()

    def thought(self, text: str) -> None:
        self.show(Text(f"{printable(text)}\n", style=THOUGHT_STYLE))

    def answer(
        self,
        status: Status,
        drafts: DraftView | None,
        num_streams: int,
        *,
        hides_thoughts: bool = False,
    ) -> AnswerView:
        region = LiveRegion(self.console, self.file)
        if drafts is None:
            return MarkdownAnswer(region, status, hides_thoughts=hides_thoughts)
        return DraftAnswer(region, status, drafts, num_streams)


class _LiveAnswer:
    """What answers on a terminal share: a region with a status line at its end."""

    def __init__(self, region: LiveRegion, status: Status) -> None:
        self.region = region
        self.console = region.console
        self.status = status
        self.drawn_at = float("-inf")

    @property
    def width(self) -> int:
        return max(8, self.console.width - 1)

    def prompt(self, done: int, total: int) -> None:
        if total < LONG_PROMPT:
            return
        self.region.update((), self.status_lines(prompt_status(done, total)))

    def status_lines(self, parts: list[str]) -> list[str]:
        """Return the status line below an empty one."""
        line = Text(fitted(parts, self.width), style="dim")
        return ["", *render(self.console, line, self.width)]

    def due(self, reply: Reply) -> bool:
        """Tell whether to draw now: with every pass, but not too often."""
        last = reply.last
        assert last is not None
        now = time.monotonic()
        if last.finish_reason is None and (last.origin or now - self.drawn_at < FRAME_S):
            return False
        self.drawn_at = now
        return True


class MarkdownAnswer(_LiveAnswer):
    """Renders Markdown block by block; lines that no longer change go to the scrollback.

    A block taller than the screen is let go line by line from its top. Thoughts are dimmed, or
    folded into one line.
    """

    def __init__(self, region: LiveRegion, status: Status, *, hides_thoughts: bool = False) -> None:
        super().__init__(region, status)
        self.hides_thoughts = hides_thoughts
        self.splitter = BlockSplitter()
        self.in_thought = False
        self.fed = 0  # segments
        self.blocks = 0
        self.let_go = 0  # lines of the growing block that are final
        self.reply: Reply | None = None
        self.final: list[str] = []

    def feed(self, reply: Reply) -> None:
        self._take(reply)
        if not self.due(reply):
            return
        lines = self._lines(self.splitter.rest)
        room = max(1, self.console.height - 4)
        enough = max(self.let_go, len(lines) - room)
        self.final += lines[self.let_go : enough]
        self.let_go = enough
        self.region.update(self.final, [*lines[enough:], *self.status_lines(self.status(reply))])
        self.final = []

    def finish(self) -> None:
        if self.reply is not None:
            self._take(self.reply)  # what a stopped answer had held back
        self._let_go(self.splitter.rest)
        self.region.close([*self.final, ""])

    def _take(self, reply: Reply) -> None:
        """Take in the segments that are new."""
        self.reply = reply
        new, self.fed = reply.segments[self.fed :], len(reply.segments)
        if self.in_thought and self.hides_thoughts:
            self.splitter.rest = f"(thought: {counted(reply.thought_tokens, 'token')})"
        for segment in new:
            if segment.is_thought != self.in_thought:
                self._let_go(self.splitter.rest)
                self.splitter, self.in_thought = BlockSplitter(), segment.is_thought
            if segment.is_thought and self.hides_thoughts:
                self.splitter.rest = f"(thought: {counted(reply.thought_tokens, 'token')})"
                continue
            for block in self.splitter.feed(printable(segment.text)):
                self._let_go(block)

    def _let_go(self, block: str) -> None:
        """Hand a complete block to the scrollback."""
        lines = self._lines(block)
        self.final += lines[self.let_go :]
        self.let_go = 0
        self.blocks += bool(lines)

    def _lines(self, block: str) -> list[str]:
        """Return a block rendered, below an empty line unless it is the first."""
        if self.in_thought:
            thought = Text(block.strip("\n"), style=THOUGHT_STYLE)
            lines = render(self.console, thought, self.width) if thought else []
        else:
            lines = block_lines(self.console, block, self.width)
        return ["", *lines] if lines and self.blocks else lines


def block_lines(console: Console, block: str, width: int) -> list[str]:
    """Return one Markdown block as lines, no empty ones around it."""
    lines = render(console, AnswerMarkdown(block), width)
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return lines


class DraftAnswer(_LiveAnswer):
    """Draws every step when it is complete."""

    def __init__(
        self, region: LiveRegion, status: Status, drafts: DraftView, num_streams: int
    ) -> None:
        super().__init__(region, status)
        self.drafts = drafts
        self.final = render(self.console, drafts.legend(num_streams), self.width)
        self.reply: Reply | None = None
        self.steps = 0

    def feed(self, reply: Reply) -> None:
        self.reply = reply
        assert reply.last is not None
        self._draw(len(reply.steps) - bool(reply.last.origin))
        if self.due(reply):
            self.region.update(self.final, self.status_lines(self.status(reply)))
            self.final = []

    def finish(self) -> None:
        if self.reply is not None:
            self._draw(len(self.reply.steps))
        self.region.close([*self.final, ""])

    def _draw(self, count: int) -> None:
        """Draw the steps up to the `count`-th."""
        assert self.reply is not None
        for step in self.reply.steps[self.steps : count]:
            self.final += render(self.console, self.drafts.step(step), self.width)
        self.steps = max(self.steps, count)


class PlainView:
    """Text alone, in the order it comes: answers to standard output, remarks to standard error."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.console = Console(file=self.out, color_system=None, force_terminal=False, width=80)

    def note(self, text: str) -> None:
        print(printable(text), file=self.err, flush=True)

    def error(self, text: str) -> None:
        print(f"specstream: {printable(text)}", file=self.err, flush=True)

    def show(self, what: RenderableType) -> None:
        for line in render(self.console, what, self.console.width):
            print(line, file=self.out)
        self.out.flush()

    def markdown(self, text: str) -> None:
        print(printable(text), file=self.out, flush=True)

    def thought(self, text: str) -> None:
        self.note(text)

    def answer(
        self,
        status: Status,
        drafts: DraftView | None,
        num_streams: int,
        *,
        hides_thoughts: bool = False,
    ) -> AnswerView:
        del status
        return PlainAnswer(self, drafts, num_streams, hides_thoughts=hides_thoughts)


class PlainAnswer:
    """Writes text as it comes, or the steps that it came in; thoughts to standard error."""

    def __init__(
        self,
        view: PlainView,
        drafts: DraftView | None,
        num_streams: int,
        *,
        hides_thoughts: bool = False,
    ) -> None:
        self.view = view
        self.hides_thoughts = hides_thoughts
        self.in_thought = False
        self.drafts = drafts
        self.num_streams = num_streams
        self.reply: Reply | None = None
        self.fed = 0  # segments

    def prompt(self, done: int, total: int) -> None:
        del done, total

    def feed(self, reply: Reply) -> None:
        self.reply = reply
        new, self.fed = reply.segments[self.fed :], len(reply.segments)
        for segment in new if self.drafts is None else ():
            self._leave_thought(segment.is_thought)
            file = self.view.err if segment.is_thought else self.view.out
            if not (segment.is_thought and self.hides_thoughts):
                print(printable(segment.text), end="", file=file, flush=True)

    def _leave_thought(self, is_thought: bool) -> None:
        """End a thought's last line before what is none."""
        if self.in_thought and not is_thought and not self.hides_thoughts:
            print(file=self.view.err, flush=True)
        self.in_thought = is_thought

    def finish(self) -> None:
        if self.reply is None:
            return
        self.feed(self.reply)  # what a stopped answer had held back
        if self.drafts is None:
            self._leave_thought(False)
            print(file=self.view.out, flush=True)
            return
        self.view.show(self.drafts.legend(self.num_streams))
        for step in self.reply.steps:
            self.view.show(self.drafts.step(step))
