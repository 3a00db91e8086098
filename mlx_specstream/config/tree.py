"""The shape of the draft trees, and the words for it on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import OptionError
from .bounds import whole
from .streams import MAX_STREAMS

TreeKind = Literal["auto", "chain", "best", "product"]


@dataclass(frozen=True)
class TreeSpec:
    """The shape of the draft trees: how many rows a step verifies, and how they are spread.

    * `auto`: what the planner finds best on this machine for this text, plain decoding included
      (`plan/`); where nothing plans, it is `best`.
    * `chain`: one path of `depth` drafts, rows = depth + 1.
    * `best`: the `rows` nodes (root included) of highest cumulative probability.
    * `product`: the paper's static tree, `branching` candidates of every stream under every
      node [SS §3.1.2]; rows = 1 + branching + branching² + ...

    `depth` 0 means as deep as there are streams. `branching` is how many of a stream's best
    candidates are considered without regard to their parent. The default is five rows: Apple's
    matrix kernels read the weights once for up to five, so these drafts are the cheapest.

    Raises:
        OptionError: a value is out of range.
    """

    kind: TreeKind = "best"
    rows: int = 5
    branching: int = 8
    depth: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "chain", "best", "product"):
            raise OptionError(f"tree kind must be auto, chain, best or product, got {self.kind!r}.")
        for name, low, high, sentence in (
            ("rows", 1, 1024, "a tree has 1 to 1024 rows"),
            ("branching", 1, 64, "a tree node has 1 to 64 candidates"),
            ("depth", 0, MAX_STREAMS, f"tree depth must be 0 to {MAX_STREAMS}"),
        ):
            object.__setattr__(self, name, whole(getattr(self, name), low, high, sentence))

    @classmethod
    def parse(cls, text: str) -> TreeSpec:
        """Read the command-line form: `auto`, `chain`, `chain3`, `16` (rows, best-first) or `3^4`.

        Raises:
            OptionError: the text has none of these forms.
        """
        word = text.strip().lower()
        if word == "auto":
            return cls(kind="auto")
        if match := re.fullmatch(r"chain(\d+)?", word):
            return cls(kind="chain", branching=1, depth=int(match[1] or 0))
        if word.isdecimal() and len(word) < 6:
            return cls(kind="best", rows=int(word))
        if (match := re.fullmatch(r"(\d{1,3})\^(\d{1,2})", word)) and int(match[2]) > 0:
            return cls(kind="product", branching=int(match[1]), depth=int(match[2]))
        raise OptionError(
            f"cannot read the tree {text!r}; use 'auto', 'chain', 'chain3' (three drafts), "
            "'16' (the best 16 rows) or '3^4' (three candidates of each of four streams)."
        )

    def __str__(self) -> str:
        if self.kind == "auto":
            return "auto"
        if self.kind == "chain":
            return f"chain{self.depth or ''}"
        if self.kind == "product":
            return f"{self.branching}^{self.depth or 'γ'}"
        return str(self.rows)

    def level_widths(self, num_streams: int) -> tuple[int, ...]:
        """Return how many nodes each level holds, before the best `rows` of all are picked.

        A beam of rows − 1 nodes per level is exact for best-first trees: no level of the best
        `rows` nodes can hold more. A level holds fewer where there are fewer candidates.

        Raises:
            OptionError: a product tree of more than 1024 rows.
        """
        depth = min(self.depth or num_streams, num_streams)
        if self.kind == "chain":
            return (1,) * depth
        if self.kind in ("auto", "best"):
            return (self.rows - 1,) * depth if self.rows > 1 else ()
        widths = tuple(self.branching ** (level + 1) for level in range(depth))
        if sum(widths) >= 1024:
            raise OptionError(
                f"the tree {self} has {sum(widths) + 1} rows; at most 1024 are allowed."
            )
        return widths

    def look_up_size(self, num_streams: int) -> tuple[int, int]:
        """Return how many looked-up nodes go into a tree, and how deep; a product tree takes none."""
        if self.kind == "product":
            return 0, 0
        if self.kind == "chain":
            depth = self.depth or num_streams or self.rows - 1
            return depth, depth
        return self.rows - 1, self.depth or self.rows - 1

    def num_nodes(self, num_streams: int) -> int:
        """Return the rows of a full tree, root included."""
        if self.kind in ("auto", "best"):
            return self.rows if num_streams else 1
        return 1 + sum(self.level_widths(num_streams))
