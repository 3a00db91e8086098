"""The batched loop: requests join and leave at any step, and every step is one pass for all.

    decoder = BatchDecoder(model)
    slot = decoder.add(prompt_ids, criteria=MaxTokens(100, stop=eos_ids))
    while decoder.busy:
        for slot, result, error in decoder.step():
            ...
        # a finished slot gives its cache back: cache = decoder.remove(slot)

A request waits until its prompt is in a cache of its own (a bounded number of prompt tokens is
computed between two steps, so that the others are never held up for long), joins the batch,
decodes in chains, and leaves with an ordinary `KVCache` of its text. Each request's tokens are
those it would get alone, whatever shares the batch.

This module knows token ids, not text. It waits for the device once per step, and schedules the
next step before it hands out results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..config import DecodeConfig
from ..config.bounds import whole
from ..errors import OptionError
from ..loading.load import StreamModel
from ..model.cache import KVCache
from ..speculation.decode import not_a_number
from ..speculation.result import DraftRecord, MaxTokens, StepResult, StopCriteria, Verdict
from ..speculation.sampling import TokenSampler
from .cache import BatchKVCache, check_cache
from .check import check_model
from .governor import BatchGovernor
from .slot import BatchEvent, Slot
from .step import BatchStep, BatchStepper

PREFILL_BUDGET = 512  # prompt tokens computed between two steps, unless asked otherwise


@dataclass
class _Pending:
    """A scheduled step and whose rows it has."""

    step: BatchStep
    slots: list[Slot]
    num_drafts: list[int]
    lengths: list[int]
    drafting: bool


@dataclass
class BatchDecoder:
    """Decodes several requests over one model, a pass for all of them at a time [SS App. F].

    Args:
        model: what `load` returns. Without streams it is decoded plainly, one token per pass.
        config: how to decode; None for the default. Drafts are chains whatever tree it names, as
            deep as that tree.
        speculative: False decodes one token per pass, with the same results.
        prefill_budget: prompt tokens that may be computed between two steps.
        keep_drafts: put every verified chain into its result.
        governor: decides before every pass whether it drafts; None for always.

    Raises:
        ModelError: the model cannot be batched exactly.
        OptionError: the config asks for what only trees have (pruning, streams at some nodes), or
            for a schedule that does not fit the streams' mode.
        StreamsError: a tensor is missing.
    """

    model: StreamModel
    config: DecodeConfig | None = None
    speculative: bool = True
    prefill_budget: int = PREFILL_BUDGET
    keep_drafts: bool = False
    governor: BatchGovernor | None = None
    stepper: BatchStepper = field(init=False)
    plain_stepper: BatchStepper = field(init=False)
    cache: BatchKVCache = field(init=False)
    running: list[Slot] = field(init=False, default_factory=list)
    waiting: deque[Slot] = field(init=False, default_factory=deque)
    _pending: _Pending | None = field(init=False, default=None)
    _drafts: mx.array | None = field(init=False, default=None)
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

    @property
    def busy(self) -> bool:
        """Tell whether a slot is waiting or running, so that another step makes sense."""
        return bool(self.waiting or self.running)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the KV caches of waiting and running slots."""
        return self.cache.nbytes + sum(slot.cache.nbytes for slot in self.waiting)

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
    ) -> Slot:
        """Take in a request and return its slot; nothing is computed yet.

        Args:
            prompt: token ids, at least one.
            cache: what comes before the prompt; None for nothing. The decoder keeps it.
            token_sampler: draws the target's tokens, for this request alone; None takes the likeliest.
                Its `history` is kept up, so it must begin as the text before the first token.
            criteria: asked with every result whether the slot needs another step, before that is
                scheduled; None for always. After no the slot is finished and waits for `remove`.

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
        slot = Slot(token_sampler, cache, ids, criteria or MaxTokens(), prompt_tokens=len(ids))
        self.waiting.append(slot)
        return slot

    def step(self) -> list[BatchEvent]:
        """Hand out the results of the scheduled step, after scheduling the next one.

        The list is empty where no slot was running yet. A failed slot (NaN, or what its token_sampler
        or `criteria` raised) leaves the batch without touching the others; remove it as usual.
        """
        events = self._finish()
        self._prefill()
        self._schedule()
        return events

    def remove(self, slot: Slot) -> KVCache:
        """Take a slot out, in whatever state it is, and return the cache of its text.

        The cache holds the prompt and all tokens handed out but the last, as a fresh prefill
        would have left it; of a slot that was waiting, as much of the prompt as was computed.

        Raises:
            OptionError: the slot was removed before, or belongs to another decoder.
        """
        if slot.state == "removed" or not self._knows(slot):
            raise OptionError("this slot is not in the batch: it was removed, or never added here.")
        if slot.state == "waiting":
            self.waiting.remove(slot)
        elif slot.state == "running":
            self._leave(slot)
            self._undisturbed = False
        slot.state = "removed"
        cache, slot.cache = slot.cache, KVCache(0)
        return cache

    def _knows(self, slot: Slot) -> bool:
        if slot.state == "waiting":
            return any(slot is other for other in self.waiting)
        if slot.state == "running":
            return any(slot is other for other in self.running)
        return True

    def _finish(self) -> list[BatchEvent]:
        """Wait for the scheduled step, the only synchronisation, and note what it decided."""
        if self._pending is None:
            return []
        pending = self._pending
        verdicts = pending.step.report.read()
        self._pending = None
        undisturbed, self._undisturbed = self._undisturbed, True
        events = [
            self._result(pending, row, verdicts[row])
            for row, slot in enumerate(pending.slots)
            if slot.state == "running"  # not removed since the step was scheduled
        ]
        if self.governor is not None:
            tokens = sum(len(event.result.tokens) for event in events if event.result is not None)
            self.governor.after(
                len(pending.slots), tokens, speculated=pending.drafting, undisturbed=undisturbed
            )
        return events

    def _result(self, pending: _Pending, row: int, verdict: Verdict) -> BatchEvent:
        """Commit what a step accepted for one slot, and ask whether it goes on."""
        slot, num_drafts = pending.slots[row], pending.num_drafts[row]
        raised = pending.step.errors.get(row)
        if raised is not None:
            return self._fail(slot, raised)
        if not verdict.finite:
            return self._fail(slot, not_a_number(pending.lengths[row]))
        tokens, nodes = verdict.tokens, 1 + num_drafts
        self.cache.lengths[slot.row] += len(tokens)
        slot.token_sampler.extend(tokens)
        draft = None
        if self.keep_drafts:
            draft = DraftRecord(
                verdict.chain[:nodes],
                [max(node - 1, 0) for node in range(nodes)],
                list(range(nodes)),
                verdict.nodes,
            )
        result = StepResult(tokens, num_drafts, pending.step.logits[row, : len(tokens)], draft)
        try:
            wanted = slot.criteria.should_continue(result)
        except Exception as error:
            return self._fail(slot, error)
        if not wanted:
            self._leave(slot)
            slot.state = "finished"
        return BatchEvent(slot, result, None)

    def _fail(self, slot: Slot, error: Exception) -> BatchEvent:
        self._leave(slot)
        slot.state = "failed"
        return BatchEvent(slot, None, error)

    def _leave(self, slot: Slot) -> None:
        """Take a running slot's rows out of the batch; the last slot moves into its place."""
        slot.cache = self.cache.leave(slot.row)
        last = self.running.pop()
        if last is not slot:
            last.row = slot.row
            self.running[slot.row] = last
        slot.row = -1

    def _prefill(self) -> None:
        """Compute prompts for at most the budget, a chunk of each waiting slot in turn."""
        streams = self.stepper.streams
        forward = streams.forward if streams is not None else self.model.backbone.forward
        left = self.prefill_budget
        while self.waiting and (left or len(self.waiting[0].pending_prompt) == 1):
            slot = self.waiting[0]
            self._undisturbed = False
            part, slot.pending_prompt = (
                slot.pending_prompt[:-1][:left],
                slot.pending_prompt[min(left, len(slot.pending_prompt) - 1) :],
            )
            if part:
                left -= len(part)
                forward(mx.array(part, dtype=mx.int32), slot.cache)
                slot.cache.advance(len(part))
                mx.async_eval(slot.cache.arrays)
            self.waiting.popleft()
            if len(slot.pending_prompt) == 1:
                self._join(slot)
            else:
                self.waiting.append(slot)
        if not self.running and self.waiting:
            # Nothing else waits for the device: do not queue up chunk after chunk.
            mx.eval([slot.cache.arrays for slot in self.waiting])

    def _join(self, slot: Slot) -> None:
        self.cache.join(slot.cache)
        slot.cache = KVCache(0)  # its rows are the batch's now
        slot.row, slot.state = len(self.running), "running"
        self.running.append(slot)

    def _schedule(self) -> None:
        """Schedule the next step for all that run."""
        if not self.running:
            self._drafts = None
            self.cache.reserve(0)
            return
        tokens, num_drafts = self._chains()
        drafting = self.governor is None or self.governor.speculates(len(self.running))
        stepper = self.stepper if drafting else self.plain_stepper
        # Drafts of the last pass are verified, whether or not this one makes any.
        self.cache.reserve(self.stepper.scratch)
        token_samplers = [slot.token_sampler for slot in self.running]
        step = stepper.step(tokens, num_drafts, token_samplers, self.cache)
        step.schedule()
        lengths = list(self.cache.lengths)
        self._pending = _Pending(step, list(self.running), num_drafts, lengths, drafting)
        self._drafts = step.next_tokens
        for row, slot in enumerate(self.running):
            slot.drafted = row

    def _chains(self) -> tuple[mx.array, list[int]]:
        """Return every running slot's root and drafts (B, T), and how many drafts are real.

        Chains come from the last step, in whatever order the slots are now; those that have just
        joined bring their root alone, behind which zeros fill up the shape.
        """
        fresh = [slot for slot in self.running if slot.drafted is None]
        if self._drafts is None or len(fresh) == len(self.running):
            roots = [[slot.pending_prompt[-1]] for slot in self.running]
            return mx.array(roots, dtype=mx.int32), [0] * len(roots)
        rows, T = self._drafts.shape
        chains = self._drafts
        if fresh:
            new = [[slot.pending_prompt[-1]] + [0] * (T - 1) for slot in fresh]
            chains = mx.concatenate([chains, mx.array(new, dtype=mx.int32)])
        order, num_drafts = [], []
        for slot in self.running:
            if slot.drafted is None:
                order.append(rows + fresh.index(slot))
            else:
                order.append(slot.drafted)
            num_drafts.append(0 if slot.drafted is None else T - 1)
        if order != list(range(chains.shape[0])):
            chains = mx.take(chains, mx.array(order, dtype=mx.int32), axis=0)
        return chains, num_drafts
