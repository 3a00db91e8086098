"""Rows of names and what they mean; where the screen is narrow, the meaning goes below the name.

wide:    /retry      answer the last question again
narrow:  /retry
             answer the last
             question again
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

GAP = 2  # cells between columns
INDENT = 4
FEWEST_CELLS = 24  # for the last column, or it goes below the others


class Listing:
    """Rows whose last column may wrap; the others are names and are never broken."""

    def __init__(self, rows: Iterable[Sequence[Text | str]] = ()) -> None:
        self.rows = [self._as_text(row) for row in rows]

    def add_row(self, *cells: Text | str) -> None:
        """Append a row, of as many cells as the others."""
        self.rows.append(self._as_text(cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.rows:
            return
        wide = sum(
            max(row[column].cell_len for row in self.rows) + GAP
            for column in range(len(self.rows[0]) - 1)
        )
        last = max(row[-1].cell_len for row in self.rows)
        if wide + min(last, FEWEST_CELLS) <= options.max_width:
            yield self._table(self.rows)
            return
        for row in self.rows:
            yield Text("  ").join(row[:-1])
            yield Padding(row[-1], (0, 0, 0, INDENT))

    @staticmethod
    def _table(rows: Sequence[Sequence[Text]]) -> Table:
        table = Table.grid(padding=(0, GAP, 0, 0))
        for _ in rows[0][:-1]:
            table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    @staticmethod
    def _as_text(cells: Sequence[Text | str]) -> list[Text]:
        return [Text(cell) if isinstance(cell, str) else cell for cell in cells]
