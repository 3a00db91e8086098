"""Each pass of an answer, drawn: who proposed the tokens it gave out, and what was rejected.

      3   sky¹ is² blue          stream 1 proposed " sky", stream 2 " is"; main said " blue"
      4   the cellˡ wallˡ is     look-up proposed " cell" and " wall"
        ✗ ¹~air~ ²~looks~        what the streams had proposed in vain

Colours tell the streams apart, superscripts do so without colour; rejected drafts are struck
through where the terminal can and stand between tildes where it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ...speculation.result import LOOK_UP
from ..tokens import TokenBytes, TokenTexts
from .session import DraftStep
from .text import on_one_line

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

STREAM_COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")
LOOK_UP_MARK, LOOK_UP_STYLE = "ˡ", "bright_green"
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class DraftView:
    """Draws the steps of one answer in turn; `coloured` tells what the terminal can do."""

    def __init__(self, tokenizer: TokenizerWrapper, *, coloured: bool) -> None:
        self.tokens = TokenBytes(tokenizer)
        self.coloured = coloured
        self.number = 0
        self.texts = TokenTexts(self.tokens)

    def legend(self, num_streams: int) -> Text:
        """Return the line that explains the marks."""
        legend = Text.assemble(("main stream", "bold"))
        for stream in range(1, num_streams + 1):
            legend.append(" · ", style="dim")
            legend.append(f"stream {stream}{mark(stream)}", style=style_of(stream))
        legend.append(" · ", style="dim")
        legend.append(f"look-up{LOOK_UP_MARK}", style=LOOK_UP_STYLE)
        legend.append(" · ", style="dim")
        return legend.append("✗ ").append_text(self._struck("rejected"))

    def step(self, step: DraftStep) -> Table:
        """Return the picture of the next step."""
        self.number += 1
        kept = Text()
        for token, origin in zip(step.tokens, step.origins, strict=True):
            kept.append(on_one_line(self.texts.next(token)), style=style_of(origin))
            kept.append(mark(origin), style=style_of(origin))
        rows = Table.grid(padding=(0, 1))
        rows.add_column(justify="right", min_width=3)
        rows.add_column(overflow="fold")
        rejected = self._rejected(step)
        rows.add_row(Text(str(self.number), style="dim"), kept)
        if rejected:
            rows.add_row(Text("✗", style="dim"), rejected)
        return rows

    def _rejected(self, step: DraftStep) -> Text:
        """Return the drafts that were not accepted, look-up's first, then stream by stream."""
        text, draft = Text(), step.draft
        if draft is None:
            return text
        nodes = set(range(len(draft.tokens))) - set(draft.accepted)
        found = set(draft.looked_up)
        by = {node: LOOK_UP if node in found else draft.depths[node] for node in nodes}
        for stream in sorted(set(by.values()) - {0}):
            text.append(" " if text else "")
            text.append(mark(stream), style=style_of(stream))
            words = [
                _word(TokenTexts(self.tokens).next(draft.tokens[node]))
                for node in sorted(nodes)
                if by[node] == stream
            ]
            for place, word in enumerate(dict.fromkeys(words)):
                text.append(" " if place else "").append_text(self._struck(word))
        return text

    def _struck(self, word: str) -> Text:
        style = Style(strike=True, dim=True)
        return Text(word, style=style) if self.coloured else Text(f"~{word}~")


def mark(origin: int) -> str:
    """Return the superscript of a stream or of look-up, nothing for the main stream."""
    if origin == LOOK_UP:
        return LOOK_UP_MARK
    return str(origin).translate(_SUPERSCRIPTS) if origin else ""


def style_of(origin: int) -> str:
    """Return the style of a stream's tokens, or of those that were looked up."""
    if origin == LOOK_UP:
        return LOOK_UP_STYLE
    return STREAM_COLOURS[(origin - 1) % len(STREAM_COLOURS)] if origin else "bold"


def drawing(view: DraftView, steps: Sequence[DraftStep], num_streams: int) -> Group:
    """Return the legend and all steps of an answer."""
    return Group(view.legend(num_streams), *(view.step(step) for step in steps))


def _word(text: str) -> str:
    """Return a rejected draft's text, its blanks visible if there is nothing else."""
    return on_one_line(text.strip(" ") or "␣" * len(text))
