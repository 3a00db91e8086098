"""One decoding step, verifying the last draft and speculating the next in one forward pass.

    tree of T nodes ──► lower layers ──► (prune) ──► streams join ──► MSA layers ──► LM head
                        T rows             m rows     m + m·γ rows                    m rows
                                                                                        │
    next tree ◄── candidates ◄── LM head on γ rows ◄── streams of the accepted node ◄── accept

Everything up to the next tree is one graph; the host waits once, for a few integers
(`Step.read`). `deferred` moves the streams behind acceptance: main rows first, then γ rows of
the accepted node alone through the MSA layers. That reads N_s/N of the weights again and saves
(m − 1)·γ rows; main rows are the base model's in both schedules.

This module knows token ids, not text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import mlx.core as mx

from .accept import AcceptedPath, accept
from .backbone import RowMask
from .cache import KVCache
from .condition import (
    NUM_CANDIDATES,
    ConditionedProposer,
    Conditioner,
    MarginalProposer,
    top_candidates,
)
from .config import DecodeConfig, TreeSpec
from .errors import ModelError, StreamsError
from .prune import Pruner, prune
from .sampling import TokenChooser
from .streams import Streams, pass_mask
from .tree import DraftTree, Proposer, ancestors, build, root_only

PREFILL_CHUNK = 2048


@dataclass(frozen=True)
class StepResult:
    """What one step decided, on the host.

    tokens: the tokens it emits, the last one the next root. drafted: draft nodes verified.
    origins: who proposed each token: its stream 1..γ, or 0 for the main stream.
    logits: (n, V) on the device, lazily, the target's at each emitted token.
    draft: the verified tree as (tokens, parents, depths, accepted nodes) if it was asked for.
    """

    tokens: list[int]
    drafted: int
    logits: mx.array
    draft: DraftRecord | None = None

    @property
    def accepted(self) -> int:
        """Return how many drafts were accepted."""
        return len(self.tokens) - 1

    @property
    def origins(self) -> list[int]:
        """Return the stream that proposed each token: 1..γ in order, then 0 for the main one."""
        return [*range(1, len(self.tokens)), 0]


@dataclass(frozen=True)
class DraftRecord:
    """A verified tree on the host: node 0 is the root; `accepted` are the nodes of its path."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    accepted: list[int]


@dataclass
class Step:
    """A step as a graph that has not been waited for.

    report: (depth + 3,) int32: accepted drafts, whether all is finite, the path's tokens.
    """

    tree: DraftTree
    path: AcceptedPath
    report: mx.array
    logits: mx.array
    next_tree: DraftTree

    def schedule(self) -> None:
        """Start computing the step and all that the next one builds on."""
        mx.async_eval(self.report, self.path.nodes, self.logits, *self.next_tree.arrays)


@dataclass
class StreamDecoder:
    """Speculative Streaming over one model with its streams [SS §3.1].

    `chooser` draws the target's token at every row, by argmax or a sampler.

    Raises:
        StreamsError: pruning was asked for, but the streams hold no pruner.
    """

    streams: Streams
    config: DecodeConfig
    chooser: TokenChooser
    keep_drafts: bool = False
    pruner: Pruner | None = field(init=False, default=None)
    conditioner: Conditioner | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        config, tensors = self.streams.config, self.streams.tensors
        if self.chooser.processors and self.config.tree.kind != "chain":
            # Processors want each row's own history, which only a chain has before it is computed.
            depth = len(self.config.tree.level_widths(config.num_streams))
            chain = TreeSpec(kind="chain", branching=1, depth=depth)
            self.config = replace(self.config, tree=chain)
        self.inline = self.config.resolved_schedule(config.mode) == "inline"
        if self.config.prune is not None:
            if not config.pruner_rank:
                raise StreamsError(
                    "pruning needs an early-exit pruner, and these streams have none; "
                    "decode without pruning, or train one."
                )
            self.pruner = Pruner(tensors["pruner.lora_a"], tensors["pruner.lora_b"])
        if config.conditioner_rank and self.config.use_conditioner:
            self.conditioner = Conditioner(
                *(tensors[f"conditioner.{n}"] for n in ("mlp_in", "mlp_out", "lora_a", "lora_b"))
            )

    # -- the loop ---------------------------------------------------------------------------

    def prefill(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        on_progress: Callable[[int, int], None] | None = None,
        chunk: int = PREFILL_CHUNK,
    ) -> None:
        """Append all of `tokens` to the committed text: main stream only, no LM head.

        The last prompt token is not for here: it is the first step's root.
        """
        prefill(self.streams.forward, tokens, cache, on_progress, chunk)

    def steps(
        self, root: int, cache: KVCache, more: Callable[[StepResult], bool]
    ) -> Iterator[StepResult]:
        """Yield step after step from `root`, the one token that is not in the cache yet.

        `more` is asked after every step whether another one is wanted; if so it is scheduled
        before the result is yielded, so that the device works while the caller shows text. A
        caller that cuts a step's tokens short rewinds the cache itself.
        """
        step = self.step(root_only(mx.array([root])), cache)
        step.schedule()
        while True:
            result = self.finish(step, cache)
            following = None
            if more(result):
                following = self.step(step.next_tree, cache)
                following.schedule()
            yield result
            if following is None:
                return
            step = following

    def finish(self, step: Step, cache: KVCache) -> StepResult:
        """Wait for a step (the loop's one synchronisation) and commit what it accepted.

        Raises:
            ModelError: the model computed NaN.
        """
        accepted, tokens = read_report(step.report, cache)
        nodes = accepted + 1
        cache.advance(nodes)
        self.chooser.history += tokens[:nodes]
        draft = None
        if self.keep_drafts:
            tree = step.tree
            draft = DraftRecord(
                _ints(tree.tokens),
                _ints(tree.parents),
                _ints(tree.depths),
                _ints(step.path.nodes)[:nodes],
            )
        return StepResult(tokens[:nodes], step.tree.num_nodes - 1, step.logits[:nodes], draft)

    # -- one step ---------------------------------------------------------------------------

    def step(self, tree: DraftTree, cache: KVCache) -> Step:
        """Build the graph of one step: verify `tree`, accept, speculate, commit.

        The committed length grows only in `finish`; until then the new rows are scratch.
        """
        streams, backbone = self.streams, self.streams.backbone
        length, upper = cache.length, streams.upper
        lower_rows = None

        # Lower layers: all nodes, no streams.
        seen = ancestors(tree.parents, tree.depth)
        positions = tree.depths + length
        mask = _mask(seen, positions, length)
        hidden = backbone.embed(tree.tokens)
        T = tree.num_nodes
        hidden = streams.run(hidden, T, streams.lower, cache, length, positions, mask)

        if self.pruner is not None and self.config.prune is not None and T > 1:
            scores = self.pruner.child_log_probs(backbone, tree, hidden)
            tree, kept = prune(tree, scores, self.config.prune)
            if tree.num_nodes < T:
                hidden = mx.take(hidden, kept, axis=1)
                seen = ancestors(tree.parents, tree.depth)
                positions = tree.depths + length
                mask = _mask(seen, positions, length)
                lower_rows = kept
                T = tree.num_nodes

        # MSA layers: with every node's streams (inline), or main rows alone (deferred).
        first = hidden
        stream_rows = None
        if self.inline:
            both = mx.concatenate([positions, streams.positions(positions)])
            allowed = pass_mask(seen, streams.num_streams, length, streams.shared)
            hidden = mx.concatenate([hidden, streams.start(hidden)], axis=1)
            row_mask = RowMask(allowed, lambda: (both, _keys(both, length)))
            hidden = streams.run(hidden, T, upper, cache, length, both, row_mask)
            stream_rows = hidden[:, T:].reshape(1, T, streams.num_streams, -1)
            hidden = hidden[:, :T]
        else:
            hidden = backbone.run(hidden, upper, cache, length, positions, mask)

        # The target's choice at every node; the longest path that agrees.
        normed = backbone.norm(hidden)
        logits = backbone.head(normed)[0]
        drawn, finite = self.chooser(logits, tree)
        path = accept(tree, seen, drawn)
        finite = finite & ~mx.any(mx.isnan(normed))

        # The accepted node's streams propose the next tree.
        if stream_rows is not None:
            chosen = mx.take(stream_rows, path.node, axis=1)
        else:
            chosen = self._deferred(first, path, positions, seen, cache)
        proposer = self._proposer(backbone.norm(chosen))
        next_tree = build(path.next_root, self.config.tree, streams.num_streams, proposer)

        self._commit(cache, path, lower_rows)
        report = mx.concatenate(
            [path.length.reshape(1), finite.reshape(1).astype(mx.int32), path.tokens]
        )
        return Step(tree, path, report, mx.take(logits, path.nodes, axis=0), next_tree)

    def _deferred(
        self,
        main: mx.array,
        path: AcceptedPath,
        positions: mx.array,
        seen: mx.array,
        cache: KVCache,
    ) -> mx.array:
        """Run the accepted node's γ streams alone through the MSA layers, (1, γ, h).

        They read the path's keys where the verifying pass left them, behind the committed text,
        and write their own behind those.
        """
        streams, length = self.streams, cache.length
        T, G = int(seen.shape[0]), streams.num_streams
        node = path.node.reshape(1)
        own = streams.positions(mx.take(positions, node))
        prefix = mx.ones((G, length), dtype=mx.bool_)
        on_path = mx.broadcast_to(mx.take(seen, node, axis=0), (G, T))
        earlier = mx.tril(mx.ones((G, G), dtype=mx.bool_))
        allowed = mx.concatenate([prefix, on_path, earlier], axis=1)
        keys = mx.concatenate([positions, own])
        mask = RowMask(allowed, lambda: (own, _keys(keys, length)))
        hidden = streams.start(mx.take(main, node, axis=1))
        return streams.run(hidden, 0, streams.upper, cache, length + T, own, mask)

    def _proposer(self, normed: mx.array) -> Proposer:
        """Return the next tree's candidates from the streams' normed states (1, γ, h)."""
        spec, backbone = self.config.tree, self.streams.backbone
        count = NUM_CANDIDATES if self.conditioner is not None else spec.branching
        marginal = top_candidates(backbone.head(normed)[0], normed[0], count)
        if self.conditioner is None:
            return MarginalProposer(marginal)
        return ConditionedProposer(self.conditioner, backbone, marginal)

    def _commit(self, cache: KVCache, path: AcceptedPath, lower_rows: mx.array | None) -> None:
        """Gather the accepted path's rows behind the committed text.

        Pruned upper layers hold fewer rows than the lower ones, so each has its own row map. An
        unpruned chain lies in place already.
        """
        streams = self.streams
        in_place = self.config.tree.kind == "chain" or path.nodes.shape[0] == 1
        if lower_rows is None and in_place:
            return
        lower = path.nodes if lower_rows is None else mx.take(lower_rows, path.nodes)
        cache.commit(lower, streams.lower)
        cache.commit(path.nodes, streams.upper)


def prefill(
    forward: Callable[[mx.array, KVCache], mx.array],
    tokens: Sequence[int],
    cache: KVCache,
    on_progress: Callable[[int, int], None] | None,
    chunk: int,
) -> None:
    """Run `tokens` through `forward` in chunks and commit them; `on_progress(done, total)`."""
    for first in range(0, len(tokens), chunk):
        part = mx.array(list(tokens[first : first + chunk]), dtype=mx.int32)
        forward(part, cache)
        cache.advance(part.shape[0])
        mx.eval(cache.arrays)
        if on_progress is not None:
            on_progress(first + part.shape[0], len(tokens))


def read_report(report: mx.array, cache: KVCache) -> tuple[int, list[int]]:
    """Wait for a step's report and return how many drafts it accepted, and its path's tokens.

    Raises:
        ModelError: the model computed NaN.
    """
    accepted, finite, *tokens = _ints(report)
    if not finite:
        raise ModelError(
            f"the model's output is not a number (NaN) after {cache.length} tokens: its weights "
            "are damaged, or overflow in this precision; check the files or use another dtype."
        )
    return accepted, tokens


def _ints(array: mx.array) -> list[int]:
    """Return a vector of integers on the host."""
    return cast(list[int], array.tolist())


def _mask(seen: mx.array, positions: mx.array, length: int) -> RowMask:
    """Return the masks of main rows: the committed text, ancestors, self."""
    alone = seen.shape[0] == 1
    allowed = None if alone else pass_mask(seen, 0, length, main_sees_streams=False)
    return RowMask(allowed, lambda: (positions, _keys(positions, length)))


def _keys(local: mx.array, length: int) -> mx.array:
    """Return the positions of all keys: the committed text's, then the pass's own rows'."""
    return mx.concatenate([mx.arange(length, dtype=mx.int32), local])
