"""The speculative loop: prefill, then step after step, waiting for the device once per step.

This module knows token ids, not text. What a step is made of is in `step.py`; `baseline.py` has
the plain loop with the same interface, whose output this one must reproduce.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as once

import mlx.core as mx

from ..config import DecodeConfig, StreamConfig, TreeSpec
from ..errors import ModelError, OptionError, StreamsError
from ..model.cache import KVCache
from ..model.prefill import PREFILL_CHUNK, ChunkSize, prefill
from .condition import Conditioner
from .prune import Pruner
from .result import DraftRecord, StepResult, read_report, to_ints
from .sampling import TokenChooser
from .step import Step, Stepper
from .streams import Streams
from .tree import root_only

log = logging.getLogger("mlx_specstream")


@dataclass
class StreamDecoder:
    """Speculative Streaming over one model with its streams [SS §3.1].

    `chooser` draws the target's tokens, by argmax or a sampler, after its logits processors.
    `keep_drafts` puts every verified tree into its step's result.

    Raises:
        StreamsError: pruning was asked for, but the streams hold no pruner; a tensor is missing.
        OptionError: the schedule does not fit the streams' mode.
    """

    streams: Streams
    config: DecodeConfig
    chooser: TokenChooser
    keep_drafts: bool = False
    stepper: Stepper = field(init=False)

    def __post_init__(self) -> None:
        trained, tensor = self.streams.config, self.streams.tensor
        pruner, conditioner = None, None
        self.chooser.typical = self.config.typical
        if self.streams.backbone.is_recurrent:
            self.config = chains_only(self.config, trained, self.streams.backbone.family)
        if self.config.prune is not None:
            if not trained.pruner_rank:
                raise StreamsError(
                    "pruning needs an early-exit pruner, and these streams have none; "
                    "decode without pruning, or train one."
                )
            pruner = Pruner(tensor("pruner.lora_a"), tensor("pruner.lora_b"))
        if trained.conditioner_rank and self.config.use_conditioner:
            names = ("mlp_in", "mlp_out", "lora_a", "lora_b")
            conditioner = Conditioner(*(tensor(f"conditioner.{name}") for name in names))
        self.stepper = Stepper(
            streams=self.streams,
            tree=self.config.tree,
            inline=self.config.resolved_schedule(
                trained.mode, know_next_token=self.streams.know_next_token
            )
            == "inline",
            chooser=self.chooser,
            prune=self.config.prune,
            pruner=pruner,
            conditioner=conditioner,
            stream_nodes=self.config.stream_nodes,
            root_inline=not (self.streams.backbone.is_recurrent or self.streams.know_next_token),
        )

    def prefill(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        on_progress: Callable[[int, int], None] | None = None,
        chunk: ChunkSize = PREFILL_CHUNK,
    ) -> None:
        """Append all of `tokens` to the committed text; the last prompt token is not for here."""
        prefill(self.streams.forward, tokens, cache, on_progress, chunk)

    def steps(
        self, root: int, cache: KVCache, more: Callable[[StepResult], bool]
    ) -> Iterator[StepResult]:
        """Yield step after step from `root`, the one token that is not in the cache yet.

        `more` is asked after every step whether another one is wanted; if so it is scheduled
        before the result is yielded, so that the device works while the caller shows text. A
        caller that cuts a step's tokens short rewinds the cache itself.

        Raises:
            ModelError: the model computed NaN.
        """
        step = self.stepper.step(root_only(mx.array([root])), cache)
        step.schedule()
        while True:
            result = self.finish(step, cache)
            following = None
            if more(result):
                following = self.stepper.step(step.next_tree, cache)
                following.schedule()
            yield result
            if following is None:
                return
            step = following

    def finish(self, step: Step, cache: KVCache) -> StepResult:
        """Wait for a step, the loop's one synchronisation, and commit what it accepted.

        Pruned upper layers hold fewer rows than the lower ones, so each has its own row map. A
        step that ended where no streams were leaves a next tree of its root alone.
        """
        try:
            found = read_report(step.report, step.tree.depth + 1, cache, step.stream_nodes)
        except ModelError:
            if not self.stepper.root_inline or step.tree.num_nodes > 1:
                raise
            # Streams that overflow spoil the rows beside them; run apart, they only draft badly.
            self.stepper = replace(self.stepper, root_inline=False)
            again = self.stepper.step(step.tree, cache)
            step.report, step.logits = again.report, again.logits
            step.next_tree, step.expected = again.next_tree, again.expected
            found = read_report(step.report, 1, cache)
        tokens, nodes = found.tokens, found.nodes
        if not found.drafting:
            step.next_tree, step.expected = root_only(mx.array(tokens[-1:])), None
        cache.commit(found.lower_rows, self.streams.lower)
        cache.commit(nodes, self.streams.upper)
        cache.advance(len(tokens), drawn=True)
        self.chooser.history += tokens
        draft = None
        if self.keep_drafts:
            tree = step.tree
            draft = DraftRecord(
                to_ints(tree.tokens), to_ints(tree.parents), to_ints(tree.depths), nodes
            )
        logits = step.logits[: len(tokens)]
        return StepResult(tokens, step.tree.num_nodes - 1, logits, draft, step.expected)


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
