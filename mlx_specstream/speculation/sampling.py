"""Drawing the target's token at the rows of a tree, with mlx-lm's samplers and processors.

Greedy and sampling are one code path: a sampler is any callable from log-probabilities (n, V)
to tokens (n,), as `mlx_lm.sample_utils.make_sampler` returns; None is the argmax.

What plain decoding would call with one row and the text so far must be called so here too, for
a processor's result depends on that text and a sampler may draw once for all rows (XTC does).
Which row comes next depends on what was drawn, but that is known on the device, and how long
the text is at each depth is known on the host. So the tree is walked in the graph:

    depth 0   root's row, text + root ──► processors ──► sampler ──► token t0
    depth 1   row of the root's child that holds t0, text + root + t0 ──► ... ──► t1
    depth 2   ...

At most depth + 1 rows are processed and drawn from, whatever the tree's size, each by a call of
its own; once no child holds the token, what follows is computed and not used. Filters that sort
a whole vocabulary are thus kept off the rows that do not need them. Greedy, without processors,
is one argmax of all rows.

The random numbers of a token depend on the answer's seed and the token's place in the text, not
on how many were drawn before: a seed gives the same text whatever the trees are, and the text
of plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import mlx.core as mx

from ..config import TypicalSpec
from .accept import typical_choice
from .randomness import seeded, take_seed
from .tree import DraftTree

Sampler = Callable[[mx.array], mx.array]
# (tokens so far (n,), logits (1, V)) -> logits (1, V), as mlx-lm's processors.
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
# (node (1,), logits (1, V) of that node) -> logits (1, V).
NodeProcessor = Callable[[mx.array, mx.array], mx.array]


@runtime_checkable
class TreeProcessor(Protocol):
    """A processor that works out on the host what holds at every node, such as a grammar.

    It is also an ordinary processor, for plain decoding and for mlx-lm.
    """

    def begin(self, prompt_tokens: int) -> None:
        """Say that an answer begins after so many tokens."""
        ...

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Return the processed logits (1, V) after `tokens` (n,)."""
        ...

    def at_nodes(self, history: Sequence[int], tree: DraftTree) -> NodeProcessor:
        """Wait for the tree and return what to do to the logits of any of its nodes.

        history: the text before the tree's root.
        """
        ...


@dataclass
class TokenSampler:
    """Draws the target's tokens of one answer.

    history: the text up to and including the root, as processors see it; `extend` keeps it up.
    seed: of this answer's random numbers; None takes one from MLX's global generator.
    typical: take likely drafts that were not drawn, which is lossy (`accept.py`).
    before: how many tokens of the text stand before `history`, such as those in a prompt cache.
    """

    sampler: Sampler | None = None
    processors: Sequence[LogitsProcessor] = ()
    history: list[int] = field(default_factory=list)
    typical: TypicalSpec | None = None
    seed: int | None = None
    before: int = 0
    _text: mx.array | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seed is None and self.sampler is not None:
            self.seed = take_seed()

    def extend(self, tokens: Sequence[int]) -> None:
        """Append what a step gave out to the text."""
        # The text on the device grows with it: making it anew costs milliseconds in a long one.
        if self._text is not None and self._text.shape[0] == len(self.history):
            self._text = mx.concatenate([self._text, mx.array(list(tokens), dtype=mx.int32)])
        self.history += tokens

    def _history(self, length: int) -> mx.array:
        """Return the first `length` tokens of the text, (length,) int32."""
        if self._text is None or self._text.shape[0] != len(self.history):
            self._text = mx.array(self.history, dtype=mx.int32)
        return self._text[:length]

    @property
    def waits(self) -> bool:
        """Tell whether the tree must be on the host before its tokens can be drawn."""
        return any(isinstance(process, TreeProcessor) for process in self.processors)

    def __call__(
        self, logits: mx.array, tree: DraftTree, ahead: bool = False
    ) -> tuple[mx.array, mx.array]:
        """Return tokens (T,) int32 for logits (T, V), and for each row whether no logit is NaN.

        Nodes that cannot be on the accepted path may hold -1 in place of a token. `ahead` says
        that the root is not in `history` yet.
        """
        # One damaged head row makes one NaN, which argmax and samplers may step over; max does not,
        # on any device. Of a row of hidden states that is NaN every logit is.
        highest = mx.max(logits, axis=-1)
        finite = highest == highest
        if self.sampler is None and not self.processors and self.typical is None:
            return self.draw(logits), finite
        past = len(self.history) - (0 if ahead else 1)
        drawn, processed = self._walk(logits, tree, past)
        return drawn, finite & processed

    def draw(self, logits: mx.array) -> mx.array:
        """Return a token for every row of processed logits (n, V), (n,) int32, in one call."""
        if self.sampler is None:
            return mx.argmax(logits, axis=-1).view(mx.int32)
        logits = logits.astype(mx.float32)
        log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self.sampler(log_probs).astype(mx.int32)

    def _draw_at(self, place: int, logits: mx.array) -> mx.array:
        """Return the token (1,) at a place of the text, for processed logits (1, V)."""
        if self.seed is None:
            return self.draw(logits)
        with seeded(self.seed, place):
            return self.draw(logits)

    def _walk(self, logits: mx.array, tree: DraftTree, past: int) -> tuple[mx.array, mx.array]:
        """Return the tokens (T,) drawn along the accepted path, -1 elsewhere, and a () bool.

        past: how many tokens of `history` stand before the root.
        """
        if self.waits:
            # The device runs the model while the host works out the processors.
            mx.async_eval(logits, *tree.arrays)
        processors = [
            _at_nodes(process, self.history[:past], tree)
            if isinstance(process, TreeProcessor)
            else _of_text(process)
            for process in self.processors
        ]
        nodes = mx.arange(tree.num_nodes, dtype=mx.int32)
        drawn = mx.full((tree.num_nodes,), -1, dtype=mx.int32)
        node = mx.zeros((1,), dtype=mx.int32)
        accepted = finite = mx.array(True)
        text = tree.tokens[:1]
        if self.processors:
            text = mx.concatenate([self._history(past), text])
        for depth in range(tree.depth + 1):
            values = mx.take(logits, node, axis=0)
            for process in processors:
                values = process(text, node, values)
            finite = finite & ~(accepted & mx.any(mx.isnan(mx.max(values, axis=-1))))
            token = self._draw_at(self.before + past + 1 + depth, values)
            children = (tree.parents == node) & (nodes > 0)
            if tree.alive is not None:
                children = children & tree.alive
            if self.typical is not None:
                token = typical_choice(self.typical, values, tree.tokens, children, token)
            drawn = mx.where(accepted & (nodes == node), token, drawn)
            if depth < tree.depth:
                child = children & (tree.tokens == token)
                accepted = accepted & mx.any(child)
                node = mx.argmax(child, keepdims=True).astype(mx.int32)
                if self.processors:
                    text = mx.concatenate([text, token])
        return drawn, finite


def _at_nodes(
    process: TreeProcessor, past: Sequence[int], tree: DraftTree
) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Return a processor that works on the host as a callable of (text, node, logits)."""
    at_nodes = process.at_nodes(past, tree)
    return lambda _, node, values: at_nodes(node, values)


def _of_text(process: LogitsProcessor) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Return a processor of mlx-lm's kind as a callable of (text, node, logits)."""
    return lambda text, _, values: process(text, values)
