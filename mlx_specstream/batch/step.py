"""One step for a batch: every sequence's chain verified and the next ones drafted, in one graph.

As `step.py` does it for one sequence and any tree, with the same streams, candidates and rule of
acceptance; a chain needs no ancestor masks, no path search and no commit. One forward pass and
one report for all sequences, whatever each of them accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..config import DecodeConfig, TreeSpec
from ..errors import OptionError
from ..loading.load import StreamModel
from ..model.backbone import Backbone
from ..speculation.condition import NUM_CANDIDATES, ConditionedProposer, Conditioner, top_candidates
from ..speculation.drafters import StreamDrafter
from ..speculation.drafting import StreamDecoder
from ..speculation.result import StepReport, Verdict
from ..speculation.sampling import TokenSampler
from ..speculation.step import REWRITTEN_AT_ONCE
from ..speculation.streams import Streams
from .cache import BatchKVCache
from .choose import draw
from .rows import deferred_rows, inline_rows, main_rows


@dataclass(frozen=True)
class BatchStep:
    """A step as a graph that has not been waited for.

    logits: (B, T, V). next_tokens: (B, 1 + D) int32, the next roots and their drafts.
    errors: what token_samplers raised, by row. drafts_late: see `Step`.
    """

    report: StepReport
    logits: mx.array
    next_tokens: mx.array
    errors: dict[int, Exception]
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

    @property
    def scratch(self) -> int:
        """Return the most columns that a pass uses behind each sequence's text."""
        T, G = 1 + self.depth, self.streams.num_streams if self.streams is not None else 0
        return T * (1 + G) if self.inline else T + G

    def step(
        self,
        tokens: mx.array,
        num_drafts: Sequence[int],
        token_samplers: Sequence[TokenSampler],
        cache: BatchKVCache,
    ) -> BatchStep:
        """Return the graph of one step over B chains, whose roots follow the committed texts.

        Args:
            tokens: (B, T) int32, each row a root and its drafts.
            num_drafts: how many drafts of each row are real: 0 to T − 1.
        """
        first, last, states = self.verify(tokens, cache)
        logits = self.backbone.head(last)
        drawn = draw(token_samplers, logits, tokens, num_drafts)
        accepted = accept(tokens, drawn.tokens, num_drafts)
        root = mx.take_along_axis(drawn.tokens, accepted[:, None], axis=1)
        if self.depth:
            states = self.stream_states(first, states, accepted, root, tokens.shape[1], cache)
            before = mx.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0]
            following = mx.concatenate([root, self.drafts(root[:, 0], before, states)], axis=1)
        else:
            following = root
        report = StepReport.of(
            accepted=accepted, finite=drawn.finite, tokens=drawn.tokens, chain=tokens
        )
        deferred = self.streams is not None and self.depth > 0 and not self.inline
        layers = self.streams.upper if deferred and self.streams is not None else range(0)
        late = cache.bytes_of(layers) > REWRITTEN_AT_ONCE
        return BatchStep(report, logits, following, drawn.errors, late)

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

    def drafts(self, roots: mx.array, before: mx.array, states: mx.array) -> mx.array:
        """Return the next chains' drafts (B, D) below `roots` (B,), from streams (B, γ, h).

        before: (B,) int32, the tokens that the roots follow.
        """
        B, D = roots.shape[0], self.depth
        normed = self.backbone.norm(states[:, :D])
        logits = self.backbone.head(normed)
        if self.conditioner is None:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        flat = normed.reshape(B * D, -1)
        marginal = top_candidates(logits.reshape(B * D, -1), flat, NUM_CANDIDATES, in_order=False)
        proposer = ConditionedProposer(self.conditioner, self.backbone, marginal)
        first_rows = mx.arange(0, B * D, D, dtype=mx.int32)
        drafts, parents = [], roots
        for level in range(D):
            parents, before = proposer.best(first_rows + level, parents, before), parents
            drafts.append(parents)
        return mx.stack(drafts, axis=1)


def accept(tokens: mx.array, drawn: mx.array, num_drafts: Sequence[int]) -> mx.array:
    """Return how many drafts each chain keeps, (B,) int32: those the target drew, from the root.

    tokens, drawn: (B, T) int32. Drafts beyond `num_drafts` are never accepted.
    """
    right = drawn[:, :-1] == tokens[:, 1:]
    if min(num_drafts) < right.shape[1]:
        real = mx.array(list(num_drafts), dtype=mx.int32)[:, None]
        right = right & (mx.arange(right.shape[1], dtype=mx.int32) < real)
    return mx.cumprod(right.astype(mx.int32), axis=1).sum(axis=1).astype(mx.int32)
