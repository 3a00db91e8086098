"""The decoders that draft every step: with any drafter, and with streams [SS §3.1].

A model whose layers keep a state drafts chains: a state is left by one row after another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as once

import mlx.core as mx

from ..config import DecodeConfig, StreamConfig, TreeSpec
from ..config.drafter import AUTO_DEPTH
from ..errors import OptionError, StreamsError
from ..model.cache import KVCache
from .decode import Decoder, committed
from .drafters import Drafter, StreamDrafter
from .drafters.lookup import Continuations, LookUp
from .prune import Pruner
from .result import StepResult, Verdict
from .sampling import TokenSampler
from .step import Step, Stepper
from .streams import Streams
from .tree import root_only

log = logging.getLogger("mlx_specstream")


@dataclass
class DraftDecoder(Decoder):
    """Decodes with what a drafter proposes, in trees as `tree` says, look-up among them if given.

    `keep_drafts` puts every verified tree into its step's result.
    """

    drafter: Drafter
    tree: TreeSpec
    token_sampler: TokenSampler
    keep_drafts: bool = False
    lookup: LookUp | None = None
    stepper: Stepper = field(init=False)

    def __post_init__(self) -> None:
        self.stepper = Stepper(self.drafter, self.tree, self.token_sampler)

    @property
    def forward(self) -> Callable[[mx.array, KVCache], mx.array]:
        """Return what runs consecutive tokens of a prompt."""
        return self.stepper.drafter.forward

    def begin(self, prompt: Sequence[int], cache: KVCache) -> None:
        """Tell the drafter, too, that an answer to `prompt` begins."""
        super().begin(prompt, cache)
        self.stepper.drafter.begin(prompt, cache)

    def first_step(self, root: int, cache: KVCache) -> Step:
        """Return the step of `root` alone, which drafts the first tree."""
        return self.stepper.step(root_only(mx.array([root])), cache)

    def next_step(self, step: Step, ahead: Step | None, result: StepResult, cache: KVCache) -> Step:
        """Return the step over the tree that `step` has drafted, and look-up has added to."""
        del ahead
        found = self.look_up()
        if not found:
            return self.stepper.step(step.next_tree, cache)
        return self.stepper.step(self.stepper.with_look_up(step, result.tokens[-1], found), cache)

    def look_up(self) -> Continuations | None:
        """Return what may follow the text by look-up, as much as a tree takes; None for nothing."""
        spec, drafter = self.stepper.tree, self.stepper.drafter
        if self.lookup is None:
            return None
        count, depth = spec.look_up_size(drafter.depth)
        chain = drafter.backbone.is_recurrent or spec.kind == "chain"
        return self.lookup.continuations(count, depth, chain=chain) or None

    def finish(self, step: Step, cache: KVCache) -> StepResult:
        """Wait for a step and commit what it accepted.

        A step that ended where nothing could be proposed leaves a next tree of its root alone.
        """
        verdict = self._read(step, cache)
        if not verdict.drafting:
            step.next_tree, step.expected = root_only(mx.array(verdict.tokens[-1:])), None
            step.proposer = None
        return committed(step, verdict, cache, self)

    def keep(self, verdict: Verdict, cache: KVCache) -> None:
        """Bring the accepted path's rows into place."""
        self.stepper.drafter.commit(verdict, cache)

    def _read(self, step: Step, cache: KVCache) -> Verdict:
        """Wait for a step and return what it decided."""
        del cache
        return step.read()


def drafter_decoder(
    drafter: Drafter,
    config: DecodeConfig,
    token_sampler: TokenSampler,
    keep_drafts: bool = False,
    lookup: LookUp | None = None,
) -> DraftDecoder:
    """Return the loop with a drafter other than streams, over one model.

    Where the tree does not say how deep, it is `AUTO_DEPTH` levels at most. Beside layers that keep
    a state it is a chain.
    """
    token_sampler.typical = config.typical
    tree = config.tree
    depth = min(tree.depth or AUTO_DEPTH, drafter.depth)
    if drafter.backbone.is_recurrent and tree.kind != "chain" and tree.rows > 1:
        rows = depth if tree.kind == "product" else tree.rows - 1
        _note_chains(drafter.backbone.family)
        tree = TreeSpec(kind="chain", branching=1, depth=min(depth, rows))
    return DraftDecoder(drafter, replace(tree, depth=depth), token_sampler, keep_drafts, lookup)


class StreamDecoder(DraftDecoder):
    """Speculative Streaming over one model with its streams [SS §3.1].

    Raises:
        StreamsError: pruning was asked for, but the streams hold no pruner; a tensor is missing.
        OptionError: the schedule does not fit the streams' mode.
    """

    def __init__(
        self,
        streams: Streams,
        config: DecodeConfig,
        token_sampler: TokenSampler,
        keep_drafts: bool = False,
        lookup: LookUp | None = None,
    ) -> None:
        token_sampler.typical = config.typical
        if streams.backbone.is_recurrent:
            config = chains_only(config, streams.config, streams.backbone.family)
        self.streams, self.config = streams, config
        drafter = _stream_drafter(streams, config)
        super().__init__(drafter, config.tree, token_sampler, keep_drafts, lookup)

    def _read(self, step: Step, cache: KVCache) -> Verdict:
        verdict = super()._read(step, cache)
        drafter = self.stepper.drafter
        assert isinstance(drafter, StreamDrafter)
        if not verdict.finite and step.tree.num_nodes == 1 and drafter.root_inline:
            # Streams that overflow spoil the rows beside them; run apart, they only draft badly.
            self.streams.overflowed = True
            again = self.stepper.step(step.tree, cache)
            step.logits, step.next_tree, step.expected = (
                again.logits,
                again.next_tree,
                again.expected,
            )
            step.proposer, step.before = again.proposer, again.before
            verdict = super()._read(again, cache)
        return verdict


def _stream_drafter(streams: Streams, config: DecodeConfig) -> StreamDrafter:
    """Return the streams as a drafter, with what the config wants of them.

    Raises:
        StreamsError, OptionError: as `StreamDecoder`.
    """
    trained, tensor = streams.config, streams.tensor
    pruner, conditioner = None, None
    if config.prune is not None:
        if not trained.pruner_rank:
            raise StreamsError(
                "pruning needs an early-exit pruner, and these streams have none; "
                "decode without pruning, or train one."
            )
        pruner = Pruner(tensor("pruner.lora_a"), tensor("pruner.lora_b"))
    if trained.conditioner_rank and config.use_conditioner:
        conditioner = streams.conditioner
    schedule = config.resolved_schedule(trained.mode, know_next_token=streams.know_next_token)
    return StreamDrafter(
        streams,
        inline=schedule == "inline",
        prune=config.prune,
        pruner=pruner,
        conditioner=conditioner,
        stream_nodes=config.stream_nodes,
    )


def chains_only(config: DecodeConfig, trained: StreamConfig, family: str) -> DecodeConfig:
    """Return `config` for a model whose layers keep a state: a chain of as many rows, deferred.

    A state is left by one row after another, so siblings have none of their own; streams continue
    from the accepted node's, which is known behind acceptance only. Trees become chains with a
    note in the log.

    Raises:
        StreamsError: shared mode, where main rows would have to see streams in those layers.
        OptionError: the inline schedule was asked for.
    """
    if trained.mode == "shared":
        raise StreamsError(
            f"streams of shared mode cannot be used with a {family} model: its main stream would "
            "have to see them in layers that keep a state; use lossless streams."
        )
    if config.schedule == "inline":
        raise OptionError(
            f"schedule 'inline' cannot be used with a {family} model, whose layers keep a state: "
            "streams run for the accepted node alone; use 'deferred' or 'auto'."
        )
    tree = config.tree
    if tree.kind == "chain" or (tree.kind != "product" and tree.rows == 1):
        return config
    rows = trained.num_streams if tree.kind == "product" else tree.rows - 1
    depth = min(tree.depth or trained.num_streams, trained.num_streams, rows)
    _note_chains(family)
    return replace(config, tree=TreeSpec(kind="chain", branching=1, depth=depth))


@once
def _note_chains(family: str) -> None:
    """Say once that trees become chains."""
    log.warning(
        "note: drafts of a %s model are chains, not trees: some of its layers keep a state, which "
        "branches cannot share.",
        family,
    )
