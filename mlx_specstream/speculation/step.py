"""One step: verify the last draft and speculate the next, in one graph.

    tree of T nodes ──► lower layers ──► (prune) ──► streams join ──► MSA layers ──► LM head
                        T rows             m rows     m + m·γ rows                    m rows
                                                                                        │
    next tree ◄── candidates ◄── LM head on γ rows ◄── streams of the accepted node ◄── accept

With `stream_nodes` only a few nodes have streams, the likeliest for the path to end at.
`deferred` moves the streams behind acceptance: main rows first, then γ rows of the accepted node
alone through the MSA layers. That reads N_s/N of the weights again and saves (m − 1)·γ rows. In
lossless mode main rows are the base model's alone in both schedules, so both draft the same. A
root without a tree is where it ends, so its streams run inline, except beside recurrent layers.
Streams that know the next token are always deferred: it is drawn by then, and still on the device.

Nothing here waits for the device: shapes depend on the configuration and the committed length.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..config import PruneSpec, TreeSpec
from ..model.cache import KVCache
from ..model.masks import RowMask, among_streams
from .accept import accept
from .condition import (
    NUM_CANDIDATES,
    ConditionedProposer,
    Conditioner,
    MarginalProposer,
    top_candidates,
)
from .prune import Pruner, prune
from .result import StepReport
from .sampling import TokenSampler
from .streams import Streams, pass_mask
from .tree import DraftTree, Proposer, ancestors, build, likely_ends, root_only


@dataclass
class Step:
    """A step as a graph that has not been waited for.

    tree: what it verifies. logits: (depth + 1, V), the target's at the path's nodes. next_tree:
    what the next step verifies. expected: see `StepResult`.
    """

    tree: DraftTree
    report: StepReport
    logits: mx.array
    next_tree: DraftTree
    expected: mx.array | None = None

    def schedule(self) -> None:
        """Start computing the step, then what the next one builds on.

        Apart, for what is evaluated together is ready together: so the host reads the report
        while the device is still running the streams and drafting the next tree.
        """
        mx.async_eval(self.report.packed, self.logits)
        expected = [] if self.expected is None else [self.expected]
        mx.async_eval(*self.next_tree.arrays, *expected)


@dataclass
class Verified:
    """The main stream's pass over a tree, before anything is decided.

    tree: what is left of it after pruning, m nodes. seen: (m, m) bool, its ancestor mask.
    positions: (m,) int32. first, last: (1, m, h), main rows at the input of the first MSA layer
    and after the final norm. streams: (1, n, γ, h) after the last layer, None when deferred.
    lower_rows: (m,) int32, where the nodes' rows are in the lower layers, None if unpruned.
    stream_nodes: (n,) int32, the nodes that have `streams`, None when all m have.
    """

    tree: DraftTree
    seen: mx.array
    positions: mx.array
    first: mx.array
    last: mx.array
    streams: mx.array | None
    lower_rows: mx.array | None
    stream_nodes: mx.array | None = None


@dataclass(frozen=True)
class Stepper:
    """The parts that steps are made of, for one model with its streams and one configuration."""

    streams: Streams
    tree: TreeSpec
    inline: bool
    token_sampler: TokenSampler
    prune: PruneSpec | None = None
    pruner: Pruner | None = None
    conditioner: Conditioner | None = None
    stream_nodes: int = 0

    @property
    def root_inline(self) -> bool:
        """Tell whether the streams of a root without a tree run in the verifying pass.

        Not beside recurrent layers; nor where streams overflowed, for they spoil the rows beside
        them, while apart they only draft badly; nor where they must know the next token.
        """
        streams = self.streams
        apart = streams.backbone.is_recurrent or streams.overflowed or streams.know_next_token
        return not apart

    def step(self, tree: DraftTree, cache: KVCache) -> Step:
        """Return the graph of one step over `tree`, whose root follows the committed text.

        New rows are scratch behind the committed text until the loop has read the report. Where
        drafts would see the cache turned quantised and the root not yet, the root goes alone.
        """
        if cache.quantises_before(tree.depth):
            tree = root_only(tree.tokens[:1])
        verified = self.verify(tree, cache)
        tree = verified.tree
        logits = self.streams.backbone.head(verified.last)[0]
        drawn, finite = self.token_sampler(logits, tree)
        path = accept(tree, verified.seen, drawn)
        finite = finite & ~mx.any(mx.isnan(verified.last))

        states = self.stream_states(verified, path.node, path.next_root, cache)
        last = mx.take(tree.tokens, path.node)
        G, proposer = self.streams.num_streams, self.candidates(states)
        next_tree = build(path.next_root, self.tree, G, proposer, last)

        lower_rows = verified.lower_rows
        report = StepReport.of(
            accepted=path.length,
            finite=finite,
            tokens=path.tokens,
            nodes=path.nodes,
            lower_rows=None if lower_rows is None else mx.take(lower_rows, path.nodes),
            stream_nodes=verified.stream_nodes,
        )
        logits = mx.take(logits, path.nodes, axis=0)
        return Step(tree, report, logits, next_tree, next_tree.expected())

    def verify(
        self, tree: DraftTree, cache: KVCache, following: mx.array | None = None
    ) -> Verified:
        """Run the tree's nodes through the model, inline with streams of all or some of them.

        following: (T,) int32, the tokens after the nodes, where a text is read again; streams
        that know the next token cannot run inline without.
        """
        streams, length = self.streams, cache.length
        backbone, upper = streams.backbone, streams.upper
        lower_rows, T = None, tree.num_nodes

        seen = ancestors(tree.parents, tree.depth)
        positions = tree.depths + length
        mask = _mask(seen, positions, length)
        hidden = self.lower(tree, cache, mask)

        if self.prune is not None and self.pruner is not None and T > 1:
            scores = self.pruner.child_log_probs(backbone, tree, hidden)
            tree, kept = prune(tree, scores, self.prune)
            if tree.num_nodes < T:
                hidden, lower_rows, T = mx.take(hidden, kept, axis=1), kept, tree.num_nodes
                seen = ancestors(tree.parents, tree.depth)
                positions = tree.depths + length
                mask = _mask(seen, positions, length)

        # MSA layers: with every node's streams (inline), or main rows alone (deferred).
        first, stream_rows, nodes = hidden, None, None
        if self.inline or (self.root_inline and T == 1):
            origins, places = hidden, positions
            if 0 < self.stream_nodes < T and tree.scores is not None:
                nodes = likely_ends(tree, self.stream_nodes)
                origins, places = mx.take(hidden, nodes, axis=1), mx.take(positions, nodes)
            both = mx.concatenate([positions, streams.positions(places)])
            allowed = pass_mask(seen, streams.num_streams, length, streams.shared, nodes)
            row_mask = RowMask(allowed, lambda: (both, _keys(both, length)))
            known = None if following is None else following[None]
            hidden = mx.concatenate([hidden, streams.start(origins, known)], axis=1)
            hidden = streams.run(hidden, T, upper, cache, length, both, row_mask)
            stream_rows = hidden[:, T:].reshape(1, -1, streams.num_streams, hidden.shape[-1])
            hidden = hidden[:, :T]
        else:
            hidden = backbone.run(hidden, upper, cache, length, positions, mask)
        last = backbone.norm(hidden)
        return Verified(tree, seen, positions, first, last, stream_rows, lower_rows, nodes)

    def lower(self, tree: DraftTree, cache: KVCache, mask: RowMask | None = None) -> mx.array:
        """Return the nodes' rows at the input of the first MSA layer, (1, T, h); no streams yet."""
        streams, length = self.streams, cache.length
        positions = tree.depths + length
        mask = mask or _mask(ancestors(tree.parents, tree.depth), positions, length)
        hidden = streams.backbone.embed(tree.tokens)
        T = tree.num_nodes
        return streams.run(hidden, T, streams.lower, cache, length, positions, mask)

    def stream_states(
        self, verified: Verified, node: mx.array, following: mx.array, cache: KVCache
    ) -> mx.array:
        """Return the streams of one node (() int32) after the last layer, (1, γ, h).

        following: () int32, the token drawn after the node.

        Deferred, they run here, through the MSA layers alone: they read the path's keys where
        the verifying pass left them, behind the committed text, and put their own behind those.
        """
        if verified.streams is not None:
            # A node without streams gets another node's; the tree made from them is never used.
            with_streams = verified.stream_nodes
            place = node if with_streams is None else mx.argmax(with_streams == node)
            return mx.take(verified.streams, place, axis=1)
        streams, length = self.streams, cache.length
        T, G = verified.tree.num_nodes, streams.num_streams
        node = node.reshape(1)
        own = streams.positions(mx.take(verified.positions, node))
        prefix = mx.ones((G, length), dtype=mx.bool_)
        on_path = mx.broadcast_to(mx.take(verified.seen, node, axis=0), (G, T))
        allowed = mx.concatenate([prefix, on_path, among_streams(1, G)], axis=1)
        keys = mx.concatenate([verified.positions, own])
        mask = RowMask(allowed, lambda: (own, _keys(keys, length)))
        hidden = streams.start(mx.take(verified.first, node, axis=1), following.reshape(1, 1))
        cache.branch(node)
        return streams.run(hidden, 0, streams.upper, cache, length + T, own, mask)

    def candidates(self, stream_states: mx.array) -> Proposer:
        """Return the next tree's candidates from the accepted node's streams (1, γ, h)."""
        backbone = self.streams.backbone
        normed = backbone.norm(stream_states)
        count = self.tree.branching
        if self.conditioner is not None:
            count = max(count, NUM_CANDIDATES)
        marginal = top_candidates(backbone.head(normed)[0], normed[0], count)
        if self.conditioner is None:
            return MarginalProposer(marginal)
        return ConditionedProposer(self.conditioner, backbone, marginal)


def _mask(seen: mx.array, positions: mx.array, length: int) -> RowMask:
    """Return the masks of main rows: the committed text, ancestors, self."""
    alone = seen.shape[0] == 1
    allowed = None if alone else pass_mask(seen, 0, length, main_sees_streams=False)
    return RowMask(allowed, lambda: (positions, _keys(positions, length)))


def _keys(local: mx.array, length: int) -> mx.array:
    """Return the positions of all keys: the committed text's, then the pass's own rows'."""
    return mx.concatenate([mx.arange(length, dtype=mx.int32), local])
