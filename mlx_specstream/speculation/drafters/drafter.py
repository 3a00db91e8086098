"""What any drafter is: what it needs of a pass, what it gives, and what it keeps between steps.

    prompt ──► forward ──► step: verify ──► (accept) ──► propose ──► tree ──► commit ──► step ...

A step runs the draft tree through the model (`verify`), finds the accepted path, and asks for
candidates below it (`propose`), all in one graph that nobody has waited for. How far the path goes
is known on the device alone until the host has read the step's report, after which `commit` is
called. So a drafter with a cache of its own puts rows for the whole path, padding included, behind
its committed ones, and learns in `commit` how many of them count.

Acceptance asks nothing of where candidates come from: no drafter can change what is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ...config import TreeSpec
from ...model.backbone import Backbone
from ...model.cache import KVCache
from ...model.masks import RowMask, causal_mask
from ..accept import AcceptedPath
from ..result import Verdict
from ..tree import DraftTree, Proposer, ancestors


@dataclass
class Verified:
    """The main stream's pass over a tree, before anything is decided.

    tree: what is left of it after pruning, m nodes. seen: (m, m) bool, its ancestor mask.
    positions: (m,) int32. last: (1, m, h), main rows after the final norm. taps: main rows
    (1, m, h) behind the layers that the drafter named, before any norm. lower_rows: (m,) int32,
    where the nodes' rows are in the lower layers, None if unpruned. drafting_nodes: (n,) int32, the
    nodes below which something can be proposed, None for all.
    """

    tree: DraftTree
    seen: mx.array
    positions: mx.array
    last: mx.array
    taps: tuple[mx.array, ...] = ()
    lower_rows: mx.array | None = None
    drafting_nodes: mx.array | None = None


class Drafter(ABC):
    """Proposes what follows an accepted path, over one model.

    depth: how many levels it can propose. taps: layers whose output it reads, ascending; the
    last layer's is what goes into the final norm.
    """

    backbone: Backbone
    depth: int
    taps: Sequence[int] = ()

    @abstractmethod
    def propose(
        self, verified: Verified, path: AcceptedPath, cache: KVCache, spec: TreeSpec
    ) -> Proposer | None:
        """Return candidates below `path.next_root`, level by level, as a part of the step's graph.

        None for none.

        cache: holds the committed text, and behind it the rows of `verified`. spec: the tree they
        are for.
        """

    def begin(self, prompt: Sequence[int], cache: KVCache) -> None:  # noqa: B027 (optional)
        """Learn that an answer to `prompt` begins, behind what `cache` holds.

        The cache may be new, rewound, or filled by others; the last prompt token is a step's root.
        """

    def read(self, tokens: mx.array, verified: Verified, cache: KVCache) -> None:  # noqa: B027 (optional)
        """Take in consecutive tokens (R,) of a prompt, with their rows; `cache.length` precede them.

        Called only where `taps` are named or `reads_prompts`; `verified` has a chain for a tree.
        """

    @property
    def reads_prompts(self) -> bool:
        """Tell whether `read` wants to be told of prompts."""
        return bool(self.taps)

    def forward(self, tokens: mx.array, cache: KVCache) -> mx.array:
        """Run consecutive tokens (R,) of a prompt; `cache.advance` is the caller's."""
        if not self.reads_prompts:
            return self.backbone.forward(tokens, cache)
        R, at = tokens.shape[0], cache.length
        nodes = mx.arange(R, dtype=mx.int32)
        hidden, taps = self._tapped(self.backbone.embed(tokens), cache, at, causal_mask(at, R))
        tree = DraftTree(tokens, mx.maximum(nodes - 1, 0), nodes, depth=R - 1)
        seen = mx.tril(mx.ones((R, R), dtype=mx.bool_))
        last = self.backbone.norm(hidden)
        self.read(tokens, Verified(tree, seen, nodes + at, last, taps), cache)
        return hidden

    def verify(self, tree: DraftTree, cache: KVCache) -> Verified:
        """Run the tree's nodes through the model; new rows are scratch behind the committed text."""
        seen = ancestors(tree.parents, tree.depth)
        positions = tree.depths + cache.length
        mask = main_mask(seen, positions, cache.length)
        hidden, taps = self._tapped(self.backbone.embed(tree.tokens), cache, positions, mask)
        return Verified(tree, seen, positions, self.backbone.norm(hidden), taps)

    def rewritten_bytes(self, verified: Verified, cache: KVCache) -> int:
        """Return how many bytes of buffers that the verifying pass reads drafting writes into."""
        del verified, cache
        return 0

    def commit(self, verdict: Verdict, cache: KVCache) -> None:
        """Bring the accepted path's rows to the end of the committed text, before it is advanced.

        A drafter with a cache of its own does the same there: `verdict.nodes` is the path.
        """
        cache.commit(verdict.nodes, range(self.backbone.num_layers))

    def _tapped(
        self, hidden: mx.array, cache: KVCache, offset: int | mx.array, mask: RowMask
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        """Run all layers over rows (1, R, h); return the last one's output, and those of `taps`."""
        first, found = 0, []
        for tap in self.taps:
            layers = range(first, tap + 1)
            hidden = self.backbone.run(hidden, layers, cache, cache.length, offset, mask)
            found.append(hidden)
            first = tap + 1
        layers = range(first, self.backbone.num_layers)
        return self.backbone.run(hidden, layers, cache, cache.length, offset, mask), tuple(found)


def main_mask(seen: mx.array, positions: mx.array, length: int) -> RowMask:
    """Return the masks of main rows: `length` committed tokens, ancestors, self.

    seen: (m, m) bool, who sees whom in the tree. positions: (m,) int32.
    """
    m = seen.shape[0]
    allowed = None
    if m > 1:
        allowed = mx.concatenate([mx.ones((m, length), dtype=mx.bool_), seen], axis=1)
    return RowMask(allowed, lambda: (positions, key_positions(positions, length)))


def key_positions(local: mx.array, length: int) -> mx.array:
    """Return the positions of all keys: the committed text's, then the pass's own rows'."""
    return mx.concatenate([mx.arange(length, dtype=mx.int32), local])
