"""One step for a batch: every sequence's chain verified and the next ones drafted, in one graph.

As `step.py` does it for one sequence and any tree, with the same streams, candidates and rule of
acceptance; a chain needs no ancestor masks, no path search and no commit. One forward pass and
one report for all sequences, whatever each of them accepts.

The next chains are drafted in the same graph. What look-up adds to them is known when the host has
read the report; then they are drafted again from the candidates that the step leaves (`chains`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx

from ..config import DecodeConfig, TreeSpec
from ..errors import OptionError
from ..loading.load import StreamModel
from ..model.backbone import Backbone
from ..speculation.condition import Conditioner
from ..speculation.drafters import StreamDrafter
from ..speculation.drafters.lookup import Continuations
from ..speculation.drafting import StreamDecoder
from ..speculation.result import StepReport, Verdict
from ..speculation.sampling import TokenSampler
from ..speculation.step import REWRITTEN_AT_ONCE
from ..speculation.streams import Streams
from .cache import BatchKVCache
from .chains import ChainCandidates, Chains, looked_up_chains, merged_chains
from .choose import draw
from .rows import deferred_rows, inline_rows, main_rows
from .sequence import BatchSequence


@dataclass(frozen=True)
class BatchStep:
    """A step as a graph that has not been waited for.

    logits: (B, T, V). next_tokens: (B, 1 + D) int32, the next roots and their drafts.
    errors: what token_samplers raised, by row. before: (B,) int32, the tokens before the next roots.
    candidates: what the drafts were taken from, None where the step drafts nothing. drafts_late: see
    `Step`.
    """

    report: StepReport
    logits: mx.array
    next_tokens: mx.array
    errors: dict[int, Exception]
    before: mx.array
    candidates: ChainCandidates | None = None
    drafts_late: bool = False

    def schedule(self) -> None:
        """Start computing the step, then what the next one builds on, as `Step.schedule` does."""
        mx.async_eval(self.report.packed, self.logits)
        if not self.drafts_late:
            mx.async_eval(self.next_tokens)

    def read(self) -> list[Verdict]:
        """Wait for the device and return what the step decided, per sequence."""
        verdicts = self.report.read()
        if self.drafts_late:
            mx.async_eval(self.next_tokens)
        return verdicts

    @property
    def num_drafts(self) -> int:
        """Return how many drafts each of the next chains has."""
        return self.next_tokens.shape[1] - 1

    def chains(self, rows: Sequence[int], found: Sequence[Continuations]) -> Chains:
        """Return the next chains of the sequences in these rows, with what look-up found of each."""
        B = self.next_tokens.shape[0]
        if self.candidates is None or not any(map(len, found)):
            return Chains(self.next_tokens, [1 + self.num_drafts] * B).take(rows)
        order = mx.array(list(rows), dtype=mx.int32)
        roots, before = (mx.take(part, order) for part in (self.next_tokens[:, 0], self.before))
        ranked = partial(_ranked, self.candidates, order)
        return merged_chains(roots, before, self.num_drafts, ranked, found)


@dataclass(frozen=True)
class BatchStepper:
    """The parts of batched steps, for one model, its streams if any, and one configuration.

    depth: drafts per chain, at most γ; 0 without streams, for plain decoding.
    """

    backbone: Backbone
    streams: Streams | None
    depth: int
    inline: bool
    conditioner: Conditioner | None

    @classmethod
    def of(cls, model: StreamModel, config: DecodeConfig, speculative: bool) -> BatchStepper:
        """Return the parts of a batched step for a model and a configuration.

        Raises:
            OptionError, StreamsError: as `BatchDecoder`.
        """
        streams, speculative = model.streams, speculative and config.uses_streams
        if streams is None or not (speculative or streams.shared):
            return cls(model.backbone, None, depth=0, inline=False, conditioner=None)
        if config.prune is not None or config.stream_nodes:
            raise OptionError(
                "a batch decodes in chains, which are not pruned and have streams at every node; "
                "leave out prune and stream_nodes."
            )
        depth = len(config.tree.level_widths(streams.num_streams)) if speculative else 0
        chain = TreeSpec(kind="chain", branching=1, depth=depth)
        parts = StreamDecoder(streams, replace(config, tree=chain), TokenSampler()).drafter
        assert isinstance(parts, StreamDrafter)
        return cls(model.backbone, streams, depth, parts.inline, parts.conditioner)

    def scratch(self, num_nodes: int) -> int:
        """Return the columns that a pass over chains of so many nodes uses behind each text."""
        G = self.streams.num_streams if self.streams is not None else 0
        return num_nodes * (1 + G) if self.inline else num_nodes + G

    def step(
        self, chains: Chains, token_samplers: Sequence[TokenSampler], cache: BatchKVCache
    ) -> BatchStep:
        """Return the graph of one step over B chains, whose roots follow the committed texts."""
        tokens = chains.tokens
        first, last, states = self.verify(tokens, cache)
        logits = self.backbone.head(last)
        drawn = draw(token_samplers, logits, chains)
        accepted = accept(chains, drawn.tokens)
        root = mx.take_along_axis(drawn.tokens, accepted[:, None], axis=1)
        before = mx.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0]
        following, candidates = root, None
        if self.depth:
            states = self.stream_states(first, states, accepted, root, tokens.shape[1], cache)
            candidates = self.candidates(states)
            drafts = self.drafts(root[:, 0], before, candidates)
            following = mx.concatenate([root, drafts], axis=1)
        report = StepReport.of(
            accepted=accepted,
            finite=drawn.finite,
            tokens=drawn.tokens,
            looked_up=chains.looked_up,
            chain=tokens,
        )
        deferred = self.streams is not None and self.depth > 0 and not self.inline
        layers = self.streams.upper if deferred and self.streams is not None else range(0)
        late = cache.bytes_of(layers) > REWRITTEN_AT_ONCE
        return BatchStep(report, logits, following, drawn.errors, before, candidates, late)

    def verify(
        self, tokens: mx.array, cache: BatchKVCache
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """Run the chains (B, T) through the model, with every node's streams if inline.

        Returns main rows (B, T, h) at the input of the first MSA layer and after the final norm,
        and the streams (B, T, γ, h) after the last layer, None when deferred.
        """
        backbone, streams = self.backbone, self.streams
        B, T = tokens.shape
        rows = main_rows(cache, T)
        hidden = backbone.embed(tokens.reshape(-1)).reshape(B, T, -1)
        if streams is None:
            every = range(backbone.num_layers)
            hidden = backbone.run(hidden, every, rows.cache, 0, rows.positions, rows.mask)
            return hidden, backbone.norm(hidden), None
        hidden = streams.run(hidden, T, streams.lower, rows.cache, 0, rows.positions, rows.mask)
        first = hidden
        if not self.inline:
            hidden = backbone.run(hidden, streams.upper, rows.cache, 0, rows.positions, rows.mask)
            return first, backbone.norm(hidden), None
        rows = inline_rows(cache, T, streams)
        hidden = mx.concatenate([hidden, streams.start(hidden)], axis=1)
        hidden = streams.run(hidden, T, streams.upper, rows.cache, 0, rows.positions, rows.mask)
        states = hidden[:, T:].reshape(B, T, streams.num_streams, -1)
        return first, backbone.norm(hidden[:, :T]), states

    def stream_states(
        self,
        first: mx.array,
        states: mx.array | None,
        accepted: mx.array,
        roots: mx.array,
        num_nodes: int,
        cache: BatchKVCache,
    ) -> mx.array:
        """Return the streams (B, γ, h) of each sequence's deepest accepted node (B,).

        roots: (B, 1) int32, the tokens drawn after those nodes.
        """
        streams = self.streams
        assert streams is not None
        if states is not None:
            return mx.take_along_axis(states, accepted[:, None, None, None], axis=1)[:, 0]
        rows = deferred_rows(cache, num_nodes, streams, accepted)
        main = mx.take_along_axis(first, accepted[:, None, None], axis=1)
        hidden = streams.start(main, roots)
        return streams.run(hidden, 0, streams.upper, rows.cache, 0, rows.positions, rows.mask)

    def candidates(self, states: mx.array) -> ChainCandidates:
        """Return the candidates of the next chains, from streams (B, γ, h)."""
        normed = self.backbone.norm(states[:, : self.depth])
        logits = self.backbone.head(normed)
        return ChainCandidates(self.backbone, self.conditioner, logits, normed)

    def drafts(self, roots: mx.array, before: mx.array, candidates: ChainCandidates) -> mx.array:
        """Return the next chains' drafts (B, D) below `roots` (B,), which follow `before` (B,)."""
        drafts, parents = [], roots
        sequences = mx.arange(roots.shape[0], dtype=mx.int32)
        for level in range(self.depth):
            best = candidates.best(level, sequences, parents, before)
            before, parents = parents, best
            drafts.append(parents)
        return mx.stack(drafts, axis=1)


def next_chains(
    sequences: Sequence[BatchSequence], last: BatchStep | None, found: Sequence[Continuations]
) -> Chains:
    """Return what the step after `last` verifies: every root and its drafts, with what was looked up.

    Streams' drafts come from `last`, in whatever order the sequences are now; those that have just
    joined have none.
    """
    old, rows = [], []
    if last is not None and last.candidates is not None:
        old = [place for place, one in enumerate(sequences) if one.drafted is not None]
        rows = [row for one in sequences if (row := one.drafted) is not None]
    new = [place for place in range(len(sequences)) if place not in old]
    if not old:
        return looked_up_chains([one.root for one in sequences], found)
    assert last is not None
    chains = last.chains(rows, [found[place] for place in old])
    if not new:
        return chains
    fresh = looked_up_chains(
        [sequences[place].root for place in new], [found[place] for place in new]
    )
    order = [*old, *new]
    return chains.beside(fresh).take([order.index(place) for place in range(len(order))])


def accept(chains: Chains, drawn: mx.array) -> mx.array:
    """Return how many drafts each chain keeps, (B,) int32: those the target drew, from the root.

    drawn: (B, T) int32. What fills a chain up is never accepted.
    """
    right, real = drawn[:, :-1] == chains.tokens[:, 1:], chains.real()
    if real is not None:
        right = right & real[:, 1:]
    return mx.cumprod(right.astype(mx.int32), axis=1).sum(axis=1).astype(mx.int32)


def _ranked(
    candidates: ChainCandidates,
    sequences: mx.array,
    level: int,
    parents: mx.array,
    before: mx.array,
    places: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return the candidates of chains as a proposer: parent b is in chain b, whose row is sequences[b]."""
    del places
    return candidates.ranked(level, sequences, parents, before)
