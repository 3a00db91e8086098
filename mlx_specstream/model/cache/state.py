"""Layers that keep no rows but a state that every token overwrites: delta nets, convolutions.

A rejected draft cannot be cut off such a state, so the state after each row of a pass is kept,
as an entry of a batch: row i's is what the layer makes of the rows 0..i and nothing more.

    committed ──► x0 ──► x1 ──► x2        states after x0, x1, x2: (3, ...), computed at once
                         └─ accepted: the next pass begins from entry 1, inside the graph

A pass begins at a length, and takes the state after so many tokens: an entry of the last pass, or
one of the few that are held for rewinding. `rewind` therefore reaches the rows of the last pass,
the beginnings of the last few passes and chunks, the marked length, and 0; `KVCache.nearest`
tells how far below a wanted length the text has to be computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .rows import LayerKV, LayerPass, OnValues

State = list[mx.array | None]
HELD = 3  # states beside the last pass's and the marked one; a state may be tens of megabytes


@dataclass
class Rows:
    """What the last pass left: `states` (n, ...) after each of its rows, or (1, ...) after all."""

    start: int
    num_rows: int
    by_row: bool
    states: State

    def after(self, length: int) -> State | None:
        """Return the state after `length` tokens of the text, None if it is not there."""
        row = length - self.start - 1
        if any(state is None for state in self.states) or not 0 <= row < self.num_rows:
            return None
        if self.by_row:
            return [None if s is None else s[row : row + 1] for s in self.states]
        return self.states if row == self.num_rows - 1 else None


class StateLayer(LayerKV):
    """The state of one layer, in `slots` arrays, each (1, ...)."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.held: dict[int, State] = {}
        self.marked = 0
        self.length = 0
        self.rows: Rows | None = None
        self.node: mx.array | None = None

    def after(self, length: int) -> State | None:
        """Return the state after `length` tokens of the text, None if it is not there."""
        if length == 0:
            return [None] * self.slots
        found = None if self.rows is None else self.rows.after(length)
        return self.held.get(length) if found is None else found

    def begin(self, start: int, num_rows: int, by_row: bool) -> tuple[State, State]:
        """Begin a pass of committed text and drafts: the state before it, and where to put new ones.

        What was held of a text beyond `start` is forgotten, for it is another text now.
        """
        before = self.after(start)
        assert before is not None, f"no state after {start} tokens"
        held = {length: state for length, state in self.held.items() if length < start}
        if start:
            held[start] = before
        for length in [n for n in held if n != self.marked][:-HELD]:
            del held[length]
        rows = Rows(start, num_rows, by_row, [None] * self.slots)
        self.held, self.rows = held, rows  # both or, if an interrupt falls in here, neither
        return before, rows.states

    def at_node(self) -> State:
        """Return the state after the last pass's row that `branch` named, (1, ...)."""
        assert self.rows is not None
        if self.node is None or not self.rows.by_row:
            return self.rows.states
        node = self.node.reshape(1)
        return [None if s is None else mx.take(s, node, axis=0) for s in self.rows.states]

    def branch(self, node: mx.array) -> None:
        """Let the streams that follow continue from row `node` (() int32) of the last pass."""
        self.node = node

    def view(
        self, start: int, offset: int | mx.array, on_values: OnValues | None = None
    ) -> StatePass:
        """Return what mlx-lm's layer sees as its cache during a pass."""
        return StatePass(self, start, offset, on_values)

    def set(self, length: int, state: State) -> None:
        """Take over the state after `length` tokens."""
        self.held, self.rows, self.length = ({length: state} if length else {}), None, length

    def gather(self, to: int, rows: mx.array) -> None:
        """Do nothing: drafts are chains, whose accepted rows are in place."""

    def follow(self, length: int) -> None:
        """Note the text's length."""
        self.length = length

    def mark(self) -> None:
        """Hold the state of the present length until another is marked."""
        self.marked = self.length

    def can_rewind(self, length: int) -> bool:
        """Tell whether the state after `length` tokens is there."""
        return length >= 0 and self.after(length) is not None

    @property
    def lengths(self) -> list[int]:
        """Return the lengths that can be rewound to."""
        found = {0, *self.held}
        if self.rows is not None:
            rows = range(self.rows.start + 1, self.rows.start + self.rows.num_rows + 1)
            found |= {length for length in rows if self.rows.after(length) is not None}
        return sorted(length for length in found if length <= self.length)

    def fresh(self) -> StateLayer:
        """Return an empty layer of the same kind."""
        return StateLayer(self.slots)

    def copy(self, length: int) -> StateLayer:
        """Return a layer of its own as this one is after `length` tokens."""
        result, state = self.fresh(), self.after(length)
        assert state is not None
        result.set(length, list(state))
        return result

    @property
    def arrays(self) -> list[mx.array]:
        """Return every state, for evaluation."""
        states = [*self.held.values(), *([self.rows.states] if self.rows else [])]
        return [array for state in states for array in state if array is not None]


class StatePass(LayerPass):
    """What a layer sees of a `StateLayer` during one pass, as of mlx-lm's `ArraysCache`.

    Consecutive rows (an int `offset`) leave the state after the last of them. Rows with positions
    of their own leave one each: `by_row`, where the layer's view (`families/states.py`) runs
    them as a batch of R. Rows behind a pass's own are streams: they continue from a row of it,
    and leave nothing.
    """

    layer: StateLayer
    lengths: mx.array | None = None
    left_padding: None = None

    def __init__(
        self,
        layer: StateLayer,
        start: int,
        offset: int | mx.array,
        on_values: OnValues | None = None,
    ) -> None:
        super().__init__(layer, start, offset, on_values)
        self.entries = 1
        self.before: State | None = None
        self.written: State = [None] * layer.slots

    def open(self, num_rows: int) -> bool:
        """Begin with `num_rows` rows; tell whether each is to leave its state.

        The rows then are a batch, entry i of which ends with row i.
        """
        rows = self.layer.rows
        if rows is not None and self.start == rows.start + rows.num_rows > self.layer.length:
            self.before = self.layer.at_node()
            return False
        by_row = isinstance(self.offset, mx.array) and num_rows > 1
        self.before, self.written = self.layer.begin(self.start, num_rows, by_row)
        if by_row:
            self.entries = num_rows
            self.lengths = mx.arange(1, num_rows + 1)
        return by_row

    def __getitem__(self, slot: int) -> mx.array | None:
        """Return a part of the state, one per entry of the batch."""
        assert self.before is not None
        array = self.before[slot]
        if array is None or self.entries == 1:
            return array
        return mx.broadcast_to(array, (self.entries, *array.shape[1:]))

    def __setitem__(self, slot: int, array: mx.array) -> None:
        """Keep a part of the new state."""
        self.written[slot] = array

    def advance(self, rows: int) -> None:
        """Count rows, which is the text's business here."""
