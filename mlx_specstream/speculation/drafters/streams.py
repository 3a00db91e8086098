"""Speculative streams as a drafter: in the verifying pass, or behind it for the accepted node alone.

Inline, streams run beside the tree's nodes, of all of them or (`stream_nodes`) of a few, the likeliest
for the path to end at. Deferred, they run after acceptance: main rows first, then γ rows of the
accepted node alone through the MSA layers. That reads N_s/N of the weights again and saves
(m − 1)·γ rows. In lossless mode main rows are the base model's alone in both schedules, so both
draft the same. A root without a tree is where it ends, so its streams run inline, except beside
recurrent layers. Streams that know the next token are always deferred: it is drawn by then, and
still on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ...config import PruneSpec, TreeSpec
from ...model.cache import KVCache
from ...model.masks import RowMask, among_streams
from ..accept import AcceptedPath
from ..condition import (
    NUM_CANDIDATES,
    ConditionedProposer,
    Conditioner,
    MarginalProposer,
    top_candidates,
)
from ..prune import Pruner, prune
from ..result import Verdict
from ..streams import Streams, pass_mask
from ..tree import DraftTree, Proposer, likely_ends
from .drafter import Drafter, Verified, key_positions, main_mask


@dataclass(kw_only=True)
class StreamRows(Verified):
    """A pass with streams in it, or with what they need to run behind it.

    first: (1, m, h), main rows at the input of the first MSA layer. streams: (1, n, γ, h) after
    the last layer, of the n `drafting_nodes` or of all; None when deferred.
    """

    first: mx.array
    streams: mx.array | None


@dataclass(eq=False)
class StreamDrafter(Drafter):
    """The streams of one model in one schedule, with what they may hold beside them.

    inline: streams run in the verifying pass. stream_nodes: of so many nodes, 0 for all.
    """

    streams: Streams
    inline: bool
    prune: PruneSpec | None = None
    pruner: Pruner | None = None
    conditioner: Conditioner | None = None
    stream_nodes: int = 0

    def __post_init__(self) -> None:
        self.backbone, self.depth = self.streams.backbone, self.streams.num_streams

    @property
    def root_inline(self) -> bool:
        """Tell whether the streams of a root without a tree run in the verifying pass.

        Not beside recurrent layers; nor where streams overflowed, for they spoil the rows beside
        them, while apart they only draft badly; nor where they must know the next token.
        """
        streams = self.streams
        apart = streams.backbone.is_recurrent or streams.overflowed or streams.know_next_token
        return not apart

    def forward(self, tokens: mx.array, cache: KVCache) -> mx.array:
        """Run consecutive tokens (R,) of a prompt; in shared mode adapters act on them too."""
        return self.streams.forward(tokens, cache)

    def commit(self, verdict: Verdict, cache: KVCache) -> None:
        """Bring the path's rows into place; pruned upper layers hold fewer rows than lower ones."""
        cache.commit(verdict.lower_rows, self.streams.lower)
        cache.commit(verdict.nodes, self.streams.upper)

    def rewritten_bytes(self, verified: Verified, cache: KVCache) -> int:
        """Return the bytes of the upper layers' buffers, which deferred streams are put into."""
        assert isinstance(verified, StreamRows)
        return 0 if verified.streams is not None else cache.bytes_of(self.streams.upper)

    def propose(
        self, verified: Verified, path: AcceptedPath, cache: KVCache, spec: TreeSpec
    ) -> Proposer:
        """Return the candidates of the accepted node's streams."""
        assert isinstance(verified, StreamRows)
        states = self.stream_states(verified, path.node, path.next_root, cache)
        return self.candidates(states, spec.branching)

    def verify(
        self, tree: DraftTree, cache: KVCache, following: mx.array | None = None
    ) -> StreamRows:
        """Run the tree's nodes through the model, inline with streams of all or some of them.

        following: (T,) int32, the tokens after the nodes, where a text is read again; streams
        that know the next token cannot run inline without.
        """
        streams, length = self.streams, cache.length
        backbone, upper = streams.backbone, streams.upper
        lower_rows, T = None, tree.num_nodes

        seen = tree.seen
        positions = tree.depths + length
        mask = main_mask(seen, positions, length)
        hidden = self.lower(tree, cache, mask)

        if self.prune is not None and self.pruner is not None and T > 1:
            scores = self.pruner.child_log_probs(backbone, tree, hidden)
            tree, kept = prune(tree, scores, self.prune)
            if tree.num_nodes < T:
                hidden, lower_rows, T = mx.take(hidden, kept, axis=1), kept, tree.num_nodes
                seen = tree.seen
                positions = tree.depths + length
                mask = main_mask(seen, positions, length)

        # MSA layers: with every node's streams (inline), or main rows alone (deferred).
        first, stream_rows, nodes = hidden, None, None
        if self.inline or (self.root_inline and T == 1):
            origins, places = hidden, positions
            if 0 < self.stream_nodes < T and tree.scores is not None:
                nodes = likely_ends(tree, self.stream_nodes)
                origins, places = mx.take(hidden, nodes, axis=1), mx.take(positions, nodes)
            both = mx.concatenate([positions, streams.positions(places)])
            allowed = pass_mask(seen, streams.num_streams, length, streams.shared, nodes)
            row_mask = RowMask(allowed, lambda: (both, key_positions(both, length)))
            known = None if following is None else following[None]
            hidden = mx.concatenate([hidden, streams.start(origins, known)], axis=1)
            hidden = streams.run(hidden, T, upper, cache, length, both, row_mask)
            stream_rows = hidden[:, T:].reshape(1, -1, streams.num_streams, hidden.shape[-1])
            hidden = hidden[:, :T]
        else:
            hidden = backbone.run(hidden, upper, cache, length, positions, mask)
        last = backbone.norm(hidden)
        return StreamRows(
            tree,
            seen,
            positions,
            last,
            lower_rows=lower_rows,
            drafting_nodes=nodes,
            first=first,
            streams=stream_rows,
        )

    def lower(self, tree: DraftTree, cache: KVCache, mask: RowMask | None = None) -> mx.array:
        """Return the nodes' rows at the input of the first MSA layer, (1, T, h); no streams yet."""
        streams, length = self.streams, cache.length
        positions = tree.depths + length
        mask = mask or main_mask(tree.seen, positions, length)
        hidden = streams.backbone.embed(tree.tokens)
        T = tree.num_nodes
        return streams.run(hidden, T, streams.lower, cache, length, positions, mask)

    def stream_states(
        self, verified: StreamRows, node: mx.array, following: mx.array, cache: KVCache
    ) -> mx.array:
        """Return the streams of one node (() int32) after the last layer, (1, γ, h).

        following: () int32, the token drawn after the node.

        Deferred, they run here, through the MSA layers alone: they read the path's keys where
        the verifying pass left them, behind the committed text, and put their own behind those.
        """
        if verified.streams is not None:
            # Of a node without streams another's are returned: the tree they make is never used.
            with_streams = verified.drafting_nodes
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
        mask = RowMask(allowed, lambda: (own, key_positions(keys, length)))
        hidden = streams.start(mx.take(verified.first, node, axis=1), following.reshape(1, 1))
        cache.branch(node)
        return streams.run(hidden, 0, streams.upper, cache, length + T, own, mask)

    def candidates(self, stream_states: mx.array, branching: int) -> Proposer:
        """Return the next tree's candidates from the accepted node's streams (1, γ, h).

        branching: how many of each stream are wanted at least.
        """
        backbone = self.streams.backbone
        normed = backbone.norm(stream_states)
        count = branching
        if self.conditioner is not None:
            count = max(count, NUM_CANDIDATES)
        marginal = top_candidates(
            backbone.head(normed).squeeze(0), normed.squeeze(0), count, in_order=False
        )
        if self.conditioner is None:
            return MarginalProposer(marginal)
        return ConditionedProposer(self.conditioner, backbone, marginal)
