"""The batched loop: requests join and leave at any step, and every step is one pass for all.

    decoder = BatchDecoder(model)
    sequence = decoder.add(prompt_ids, criteria=MaxTokens(100, stop=eos_ids))
    while decoder.busy:
        for sequence, result, error in decoder.step():
            ...
        # a finished sequence gives its cache back: cache = decoder.remove(sequence)

A request waits until its prompt is in a cache of its own (a bounded number of prompt tokens is
computed between two steps, so that the others are never held up for long), joins the batch,
decodes in chains, and leaves with an ordinary `KVCache` of its text. Each request's tokens are
those it would get alone, whatever shares the batch.

Chains are the streams', of what look-up finds in each request's own text, or of both. This module
knows token ids, not text. It waits for the device once per step, and schedules the next step
before it hands out results.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache as once

import mlx.core as mx

from ..config import DecodeConfig
from ..config.bounds import whole
from ..errors import OptionError
from ..loading.load import StreamModel
from ..machine import ranks
from ..model.cache import KVCache
from ..speculation.decode import not_a_number
from ..speculation.drafters.lookup import FileIndex
from ..speculation.result import MaxTokens, StopCriteria, Verdict
from ..speculation.sampling import TokenSampler
from .cache import BatchKVCache, check_cache
from .check import check_model
from .governor import BatchGovernor
from .lookup import BatchLookUp, nothing
from .scheduled import ScheduledPass
from .sequence import BatchEvent, BatchSequence
from .step import BatchStep, BatchStepper, next_chains

log = logging.getLogger("mlx_specstream")

PREFILL_BUDGET = 512  # prompt tokens computed between two steps, unless asked otherwise


@dataclass
class BatchDecoder:
    """Decodes several requests over one model, a pass for all of them at a time [SS App. F].

    Args:
        model: what `load` returns. Without streams it is decoded plainly, one token per pass.
        config: how to decode; None for the default. Drafts are chains whatever tree it names, as
            deep as that tree; of look-up, as long as that tree has rows.
        speculative: False decodes one token per pass, with the same results.
        prefill_budget: prompt tokens that may be computed between two steps.
        keep_drafts: put every verified chain into its result.
        governor: decides before every pass whether it drafts, and how much of what was looked up it
            verifies; None for always, and all.
        files: what else to look up in, where drafts are looked up.

    Raises:
        ModelError: the model cannot be batched exactly.
        OptionError: the config asks for what only trees have (pruning, streams at some nodes), for
            a schedule that does not fit the streams' mode, or for look-up alone where that cannot be.
        StreamsError: a tensor is missing.
    """

    model: StreamModel
    config: DecodeConfig | None = None
    speculative: bool = True
    prefill_budget: int = PREFILL_BUDGET
    keep_drafts: bool = False
    governor: BatchGovernor | None = None
    files: FileIndex | None = None
    stepper: BatchStepper = field(init=False)
    plain_stepper: BatchStepper = field(init=False)
    lookup: BatchLookUp | None = field(init=False, default=None)
    cache: BatchKVCache = field(init=False)
    running: list[BatchSequence] = field(init=False, default_factory=list)
    waiting: deque[BatchSequence] = field(init=False, default_factory=deque)
    _pending: ScheduledPass | None = field(init=False, default=None)
    _last: BatchStep | None = field(init=False, default=None)
    _undisturbed: bool = field(init=False, default=False)  # since the last pass was done

    def __post_init__(self) -> None:
        self.prefill_budget = whole(
            self.prefill_budget, 1, None, "prefill_budget must be at least 1"
        )
        check_model(self.model.backbone)
        config = self.config or DecodeConfig()
        self.stepper = BatchStepper.of(self.model, config, self.speculative)
        self.plain_stepper = BatchStepper.of(self.model, config, speculative=False)
        self.cache = BatchKVCache(self.model.backbone.num_layers)
        if self.speculative:
            self.lookup = BatchLookUp.of(self.model, config, self.governor, self.files)
        if self.speculative and config.uses_streams and self.model.drafter is not None:
            _note_drafter()

    @property
    def busy(self) -> bool:
        """Tell whether a sequence is waiting or running, so that another step makes sense."""
        return bool(self.waiting or self.running)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the KV caches of waiting and running sequences."""
        return self.cache.nbytes + sum(sequence.cache.nbytes for sequence in self.waiting)

    def new_cache(self) -> KVCache:
        """Return an empty cache of the kind that requests are batched with."""
        return KVCache(self.model.backbone.num_layers)

    def add(
        self,
        prompt: Sequence[int],
        *,
        cache: KVCache | None = None,
        token_sampler: TokenSampler | None = None,
        criteria: StopCriteria | None = None,
        text: Sequence[int] = (),
    ) -> BatchSequence:
        """Take in a request and return its sequence; nothing is computed yet.

        Args:
            prompt: token ids, at least one.
            cache: what comes before the prompt; None for nothing. The decoder keeps it.
            token_sampler: draws the target's tokens, for this request alone; None takes the likeliest.
                Its `history` is kept up, so it must begin as the text before the first token.
            criteria: asked with every result whether the sequence needs another step, before that is
                scheduled; None for always. After no the sequence is finished and waits for `remove`.
            text: what precedes the answer, if more is known of it than the prompt, for look-up.

        Raises:
            OptionError: no prompt, or a cache that cannot be batched.
        """
        if not len(prompt):
            raise OptionError("the prompt is empty; give at least one token.")
        if cache is None:
            cache = self.new_cache()
        check_cache(cache, self.model.backbone.num_layers)
        ids = [int(token) for token in prompt]
        token_sampler = token_sampler or TokenSampler(history=list(ids))
        token_sampler.typical = self.config.typical if self.config is not None else None
        lookup = None
        if self.lookup is not None:
            lookup = self.lookup.begin(ids, cache, token_sampler.history, text)
        sequence = BatchSequence(
            token_sampler, cache, ids, criteria or MaxTokens(), len(ids), ids[-1], lookup
        )
        self.waiting.append(sequence)
        return sequence

    def step(self) -> list[BatchEvent]:
        """Hand out the results of the scheduled step, after scheduling the next one.

        The list is empty where no sequence was running yet. A failed sequence (NaN, or what its token_sampler
        or `criteria` raised) leaves the batch without touching the others; remove it as usual.
        """
        events = self._finish()
        self._prefill()
        self._schedule()
        return events

    def remove(self, sequence: BatchSequence) -> KVCache:
        """Take a sequence out, in whatever state it is, and return the cache of its text.

        The cache holds the prompt and all tokens handed out but the last, as a fresh prefill
        would have left it; of a sequence that was waiting, as much of the prompt as was computed.

        Raises:
            OptionError: the sequence was removed before, or belongs to another decoder.
        """
        if sequence.state == "removed" or not self._knows(sequence):
            raise OptionError(
                "this sequence is not in the batch: it was removed, or never added here."
            )
        if sequence.state == "waiting":
            self.waiting.remove(sequence)
        elif sequence.state == "running":
            self._leave(sequence)
            self._undisturbed = False
        sequence.state = "removed"
        cache, sequence.cache = sequence.cache, KVCache(0)
        return cache

    def _knows(self, sequence: BatchSequence) -> bool:
        if sequence.state == "waiting":
            return any(sequence is other for other in self.waiting)
        if sequence.state == "running":
            return any(sequence is other for other in self.running)
        return True

    def _finish(self) -> list[BatchEvent]:
        """Wait for the scheduled step, the only synchronisation, and note what it decided."""
        if self._pending is None:
            return []
        pending = self._pending
        verdicts = pending.step.read()
        self._pending = None
        undisturbed, self._undisturbed = self._undisturbed, True
        events = [
            self._result(pending, row, verdicts[row])
            for row, sequence in enumerate(pending.sequences)
            if sequence.state == "running"  # not removed since the step was scheduled
        ]
        if self.governor is not None:
            tokens = sum(len(event.result.tokens) for event in events if event.result is not None)
            self.governor.after(
                len(pending.sequences),
                tokens,
                speculated=pending.drafting,
                undisturbed=undisturbed,
                drafted=pending.drafted,
                widened=pending.widened,
            )
            for verdict, promised in zip(verdicts, pending.promised, strict=True):
                self.governor.accepted(len(verdicts), promised, len(verdict.tokens) - 1)
        return events

    def _result(self, pending: ScheduledPass, row: int, verdict: Verdict) -> BatchEvent:
        """Commit what a step accepted for one sequence, and ask whether it goes on."""
        sequence, raised = pending.sequences[row], pending.step.errors.get(row)
        if raised is not None:
            return self._fail(sequence, raised)
        if not verdict.finite:
            return self._fail(sequence, not_a_number(pending.lengths[row]))
        tokens = verdict.tokens
        self.cache.lengths[sequence.row] += len(tokens)
        sequence.root = tokens[-1]
        sequence.token_sampler.extend(tokens)
        if sequence.lookup is not None:
            sequence.lookup.hear(tokens)
        result = pending.result(row, verdict, keep_drafts=self.keep_drafts)
        try:
            wanted = sequence.criteria.should_continue(result)
        except Exception as error:
            return self._fail(sequence, error)
        if not wanted:
            self._leave(sequence)
            sequence.state = "finished"
        return BatchEvent(sequence, result, None)

    def _fail(self, sequence: BatchSequence, error: Exception) -> BatchEvent:
        self._leave(sequence)
        sequence.state = "failed"
        return BatchEvent(sequence, None, error)

    def _leave(self, sequence: BatchSequence) -> None:
        """Take a running sequence's rows out of the batch; the last sequence moves into its place."""
        sequence.cache = self.cache.leave(sequence.row)
        if sequence.lookup is not None:
            sequence.lookup.keep_beside(sequence.cache)
        last = self.running.pop()
        if last is not sequence:
            last.row = sequence.row
            self.running[sequence.row] = last
        sequence.row = -1

    def _prefill(self) -> None:
        """Compute prompts for at most the budget, a chunk of each waiting sequence in turn."""
        streams = self.stepper.streams
        forward = streams.forward if streams is not None else self.model.backbone.forward
        left = self.prefill_budget
        while self.waiting and (left or len(self.waiting[0].pending_prompt) == 1):
            sequence = self.waiting[0]
            self._undisturbed = False
            part, sequence.pending_prompt = (
                sequence.pending_prompt[:-1][:left],
                sequence.pending_prompt[min(left, len(sequence.pending_prompt) - 1) :],
            )
            if part:
                left -= len(part)
                hidden = forward(mx.array(part, dtype=mx.int32), sequence.cache)
                sequence.cache.advance(len(part))
                # Among processes the hidden states are messages, which all must see through.
                mx.async_eval(sequence.cache.arrays, hidden if ranks.group() else [])
            self.waiting.popleft()
            if len(sequence.pending_prompt) == 1:
                self._join(sequence)
            else:
                self.waiting.append(sequence)
        if not self.running and self.waiting:
            # Nothing else waits for the device: do not queue up chunk after chunk.
            mx.eval([sequence.cache.arrays for sequence in self.waiting])

    def _join(self, sequence: BatchSequence) -> None:
        if sequence.lookup is not None:
            sequence.lookup.read()  # while the device computes the prompt
        self.cache.join(sequence.cache)
        sequence.cache = KVCache(0)  # its rows are the batch's now
        sequence.row, sequence.state = len(self.running), "running"
        self.running.append(sequence)

    def _schedule(self) -> None:
        """Schedule the next step for all that run."""
        if not self.running:
            self._last = None
            self.cache.reserve(0)
            return
        requests, last = len(self.running), self._last
        drafted = 0 if last is None or last.candidates is None else last.num_drafts
        found, widened = nothing(self.running)
        if self.lookup is not None:
            found, widened = self.lookup.found(self.running, drafted)
        chains = next_chains(self.running, last, found)
        drafting = self.stepper.depth > 0
        if drafting and self.governor is not None:
            drafting = self.governor.speculates(requests)
        stepper = self.stepper if drafting else self.plain_stepper
        # Drafts of the last pass are verified, whether or not this one makes any.
        self.cache.reserve(self.stepper.scratch(chains.tokens.shape[1]))
        token_samplers = [sequence.token_sampler for sequence in self.running]
        step = stepper.step(chains, token_samplers, self.cache)
        step.schedule()
        lengths = list(self.cache.lengths)
        promised = [0.0 if drafted else one.expected(len(one)) for one in found]
        self._pending = ScheduledPass(
            step, list(self.running), chains, lengths, drafting, drafted, widened, promised
        )
        self._last = step
        for row, sequence in enumerate(self.running):
            sequence.drafted = row
            if sequence.lookup is not None:
                sequence.lookup.read()  # while the device is at work


@once
def _note_drafter() -> None:
    """Say once that a draft model or heads draft for requests that are alone."""
    log.warning(
        "note: requests that share a pass are not drafted for by the draft model, but by look-up "
        "where that pays; a request that is alone has both."
    )
