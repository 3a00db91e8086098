"""The decoding loop: prefill; then, while another step is wanted, step, schedule, yield, commit.

    prompt ──► prefill ──► step ──► finish: wait, accept, commit ──► tokens
                            ▲                                          │
                            └────────── next step ◄── should continue? ┘

`decode` is that loop, for every way of decoding. What a step is made of is in `step.py`; a
`Decoder` says which step comes next: `DraftDecoder` always drafts, `PlainDecoder` (`plain.py`)
never, `AutoDecoder` (`planner/adaptive.py`) as it pays. This module knows token ids, not text.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as once

import mlx.core as mx

from ..config import DecodeConfig, StreamConfig, TreeSpec
from ..config.drafter import AUTO_DEPTH
from ..errors import ModelError, OptionError, StreamsError
from ..model.cache import KVCache
from ..model.prefill import PREFILL_CHUNK, ChunkSize, prefill
from .drafters import Drafter, StreamDrafter
from .drafters.lookup import Continuations, LookUp
from .prune import Pruner
from .result import DraftRecord, StepResult, StopCriteria, Verdict, to_ints
from .sampling import TokenSampler
from .step import Step, Stepper
from .streams import Streams
from .tree import root_only

log = logging.getLogger("mlx_specstream")


def decode(
    decoder: Decoder,
    prompt: Sequence[int],
    cache: KVCache,
    criteria: StopCriteria,
    on_progress: Callable[[int, int], None] | None = None,
    chunk: ChunkSize = PREFILL_CHUNK,
) -> Iterator[StepResult]:
    """Continue a text by one accepted path after another until `criteria` have had enough.

    The text is what `cache` holds, then `prompt`, of which all but the last token are in the
    prefill; the last one is the root of the first step. The following step is scheduled before a
    result is yielded, so that the device works while the caller shows text. A caller that wants
    only some of the last step's tokens rewinds the cache itself.

    Args:
        prompt: token ids, at least one.
        on_progress: told (prompt tokens done, of how many).
        chunk: prompt tokens per pass.

    Raises:
        ModelError: the model computed NaN.
    """
    decoder.begin(prompt, cache)
    decoder.prefill(prompt[:-1], cache, on_progress, chunk)
    step = decoder.first_step(prompt[-1], cache)
    step.schedule()
    if decoder.lookup is not None:
        decoder.lookup.read()
    while True:
        # Plain decoding starts the next pass from a token that the host has not read yet.
        ahead = decoder.step_ahead(step, cache)
        if ahead is not None:
            ahead.schedule()
        result = decoder.finish(step, cache)  # waits for the device, once per step
        wanted = criteria.should_continue(result)
        decoder.learn(result, cache, wanted=wanted)
        following = decoder.next_step(step, ahead, result, cache) if wanted else None
        if following is not None and following is not ahead:
            following.schedule()
        decoder.pause()
        yield result
        decoder.resume()
        if following is None:
            return
        step = following


class Decoder(ABC):
    """One way of decoding: which step comes first, and which one next.

    token_sampler: draws the target's tokens, by argmax or a sampler, after logits processors.
    lookup: told of all tokens, if there is one.
    """

    token_sampler: TokenSampler
    keep_drafts: bool
    lookup: LookUp | None

    @property
    @abstractmethod
    def forward(self) -> Callable[[mx.array, KVCache], mx.array]:
        """Return what runs consecutive tokens of a prompt."""

    def begin(self, prompt: Sequence[int], cache: KVCache) -> None:
        """Learn that an answer to `prompt` begins, behind what `cache` holds."""
        if self.lookup is not None:
            self.lookup.begin(prompt, cache, self.token_sampler.history)

    @abstractmethod
    def first_step(self, root: int, cache: KVCache) -> Step:
        """Return the step of the one token that is not in the cache yet, without drafts."""

    def step_ahead(self, step: Step, cache: KVCache) -> Step | None:
        """Return the step after `step`, which has not been read yet, if that can be built."""
        del step, cache
        return None

    @abstractmethod
    def next_step(self, step: Step, ahead: Step | None, result: StepResult, cache: KVCache) -> Step:
        """Return the step after `step`, which decided `result`; `ahead`: what `step_ahead` gave."""

    @abstractmethod
    def finish(self, step: Step, cache: KVCache) -> StepResult:
        """Wait for a step, the loop's one synchronisation, and commit what it accepted."""

    def keep(self, verdict: Verdict, cache: KVCache) -> None:  # noqa: B027 (optional)
        """Bring the rows of an accepted path to the end of the committed text."""

    def learn(self, result: StepResult, cache: KVCache, *, wanted: bool) -> None:  # noqa: B027 (optional)
        """Take note of a step's result before the next one is built, if one is `wanted`."""

    def pause(self) -> None:  # noqa: B027 (optional)
        """Learn that the caller takes over, for as long as it likes."""

    def resume(self) -> None:  # noqa: B027 (optional)
        """Learn that the caller wants to go on."""

    def prefill(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        on_progress: Callable[[int, int], None] | None = None,
        chunk: ChunkSize = PREFILL_CHUNK,
    ) -> None:
        """Append all of `tokens` to the committed text; the last prompt token is not for here."""
        if tokens:
            prefill(self.forward, tokens, cache, on_progress, chunk)
            mx.clear_cache()  # of the chunks' intermediate results, which no step needs

    def steps(self, root: int, cache: KVCache, criteria: StopCriteria) -> Iterator[StepResult]:
        """Yield step after step from `root`, the one token that is not in the cache yet."""
        return decode(self, [root], cache, criteria)


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
        """Return what may follow the text by look-up, as much as a tree takes; None for nothing.

        A product tree is the streams' alone.
        """
        spec, chain = self.stepper.tree, self.stepper.drafter.backbone.is_recurrent
        if self.lookup is None or spec.kind == "product":
            return None
        if spec.kind == "chain":
            count = depth = spec.depth or self.stepper.drafter.depth or spec.rows - 1
        else:
            count, depth = spec.rows - 1, spec.depth or spec.rows - 1
        chain = chain or spec.kind == "chain"
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
        return step.report.read()[0]


def drafter_decoder(
    drafter: Drafter,
    config: DecodeConfig,
    token_sampler: TokenSampler,
    keep_drafts: bool = False,
    lookup: LookUp | None = None,
) -> DraftDecoder:
    """Return the loop with a drafter other than streams, over one model.

    Where the tree does not say how deep, it is `AUTO_DEPTH` levels at most; a tree `auto` is not
    planned. Beside layers that keep a state it is a chain.
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


def committed(step: Step, verdict: Verdict, cache: KVCache, decoder: Decoder) -> StepResult:
    """Commit what a step accepted, and return its result.

    Raises:
        ModelError: the model computed NaN.
    """
    if not verdict.finite:
        raise not_a_number(cache.length)
    tokens, nodes = verdict.tokens, verdict.nodes
    decoder.keep(verdict, cache)
    cache.advance(len(tokens), generated=True)
    decoder.token_sampler.extend(tokens)
    if decoder.lookup is not None:
        decoder.lookup.take(tokens)
    draft, tree = None, step.tree
    if decoder.keep_drafts:
        found = [] if tree.looked_up is None else to_ints(tree.looked_up)
        draft = DraftRecord(
            to_ints(tree.tokens),
            to_ints(tree.parents),
            to_ints(tree.depths),
            nodes,
            tuple(node for node, looked_up in enumerate(found) if looked_up),
        )
    logits = step.logits[: len(tokens)]
    return StepResult(tokens, tree.num_nodes - 1, logits, draft, step.expected, verdict.looked_up)


def not_a_number(length: int) -> ModelError:
    """Return the error of a model that computed NaN behind `length` committed tokens."""
    return ModelError(
        f"the model's output is not a number (NaN) after {length} tokens: its weights are "
        "damaged, or overflow in this precision; check the files or use another dtype."
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
