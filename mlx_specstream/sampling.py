"""Drawing the target's token at every row of a tree, with mlx-lm's samplers and processors.

Greedy and sampling are one code path: a sampler is any callable from log-probabilities (T, V)
to tokens (T,), as `mlx_lm.sample_utils.make_sampler` returns; None is the argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from .tree import DraftTree

Sampler = Callable[[mx.array], mx.array]
# (tokens so far (n,), logits (1, V)) -> logits (1, V), as mlx-lm's processors.
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass
class TokenChooser:
    """Draws one token per row.

    With `processors`, every row gets its own history: the text so far plus the drafts above the
    row. Its length must be known before the device has computed the tree, which only a chain
    grants; `history` holds the tokens up to and including the root, kept up by the caller.
    """

    sampler: Sampler | None = None
    processors: Sequence[LogitsProcessor] = ()
    history: list[int] = field(default_factory=list)

    def __call__(self, logits: mx.array, tree: DraftTree) -> tuple[mx.array, mx.array]:
        """Return tokens (T,) int32 for logits (T, V), and a () bool: no logit is NaN."""
        if self.processors:
            logits = self._processed(logits, tree)
        if self.sampler is None:
            drawn = mx.argmax(logits, axis=-1)
        else:
            logits = logits.astype(mx.float32)
            drawn = self.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        drawn = drawn.astype(mx.int32)
        # One damaged head row makes one NaN, which argmax and samplers may step over.
        return drawn, ~mx.any(mx.isnan(mx.max(logits, axis=-1)))

    def _processed(self, logits: mx.array, tree: DraftTree) -> mx.array:
        """Return logits after the processors, row i seeing the history and drafts 1..i."""
        past = mx.array(self.history[:-1], dtype=mx.int32)
        rows = []
        for row in range(tree.num_nodes):
            tokens = mx.concatenate([past, tree.tokens[: row + 1]])
            values = logits[row : row + 1]
            for process in self.processors:
                values = process(tokens, values)
            rows.append(values)
        return mx.concatenate(rows)
