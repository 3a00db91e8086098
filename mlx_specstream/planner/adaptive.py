"""Decoding that is speculative while that pays and plain while it does not.

Each step is made by one of the decoders there are, so plain steps are plain decoding, with the same
pipelining:

    speculate ── a plan with another tree: the next step builds it ──┐
        │  ▲─────────────────────────────────────────────────────────┘
        │  │ a plan again: one step of the root alone restarts the drafter
        ▼  │
      plain decoding ◄──► look up: drafts of the text's own, where nothing else drafts

Looked-up drafts join the tree of a speculative step, which grows by them where they are worth rows. In
plain decoding they are verified by steps of their own, if `LookUpPlanner` thinks that they pay; the
pass that is under way by then is read first, and none is scheduled ahead of it.

The decoder changes between steps, where all agree on what is committed and which token comes
next. Decisions rest on past tokens and times alone, so they cannot bias what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import mlx.core as mx

from ..config import DecodeConfig, TreeSpec
from ..model.backbone import Backbone
from ..model.cache import KVCache
from ..speculation.decode import Decoder
from ..speculation.drafters import NoDrafter
from ..speculation.drafters.lookup import Continuations, LookUp, looked_up_tree
from ..speculation.drafting import DraftDecoder, StreamDecoder
from ..speculation.plain import PlainDecoder, plain_decoder
from ..speculation.result import StepResult
from ..speculation.sampling import TokenSampler
from ..speculation.step import Step, Stepper
from ..speculation.streams import Streams
from .lookup import SIZES, LookUpPlanner
from .settings import StepSetting


class Governor(Protocol):
    """Decides between steps how to go on. None stands for plain decoding."""

    def begin(self, length: int) -> StepSetting | None:
        """Return the plan to begin an answer with, after `length` committed tokens."""

    def after(
        self, result: StepResult, drafted_by: StepSetting | None, length: int
    ) -> StepSetting | None:
        """Take in a step's result and return the plan to go on with.

        drafted_by: the plan whose tree was verified, None for a step without drafts.
        """

    def looked_up(self, length: int) -> None:
        """Learn of a step of look-up alone, in place of a plain one."""

    def worth(self, plan: StepSetting) -> tuple[float, float]:
        """Return the tokens that a step of this plan should yield, and its price in plain tokens."""

    def plain_tokens_ahead(self) -> int | None:
        """Return how many more plain tokens are certain, None for any number."""

    def pause(self) -> None:
        """Learn that the caller takes over, for as long as it likes."""

    def resume(self) -> None:
        """Learn that the caller wants to go on."""


@dataclass
class AutoDecoder(Decoder):
    """Decodes as its governor says, step by step plainly or with the tree it asks for.

    `config` supplies what plans leave open. Drafts come from the `streams`, or in their place from
    `drafting`, whose tree is then the governor's only plan. Without either and a governor there are
    plain steps alone, and those of look-up, if there is a `lookup`; `lookups` says when they pay.

    Raises:
        StreamsError: a tensor of the streams is missing.
        OptionError: the schedule does not fit the streams' mode.
    """

    streams: Streams | None
    config: DecodeConfig
    token_sampler: TokenSampler
    governor: Governor | None
    keep_drafts: bool = False
    lookup: LookUp | None = None
    lookups: LookUpPlanner | None = None
    backbone: Backbone | None = None
    drafting: DraftDecoder | None = None
    plain: PlainDecoder | StreamDecoder = field(init=False)
    _steppers: dict[StepSetting, Stepper] = field(init=False, default_factory=dict)
    _alone: DraftDecoder | None = field(init=False, default=None)  # look-up alone
    _plan: StepSetting | None = field(init=False, default=None)  # to go on with
    # What made the step under way, and the tree that it verifies: a plan, rows of look-up alone, or
    # None for plain decoding.
    _made_by: StepSetting | int | None = field(init=False, default=None)
    _drafted_by: StepSetting | int | None = field(init=False, default=None)
    _found: Continuations | None = field(init=False, default=None)  # after the newest step
    _rows: int = field(init=False, default=0)  # of look-up that pay after it, 0 for none
    _ahead: bool = field(init=False, default=False)  # whether the step after it is under way
    _was_ahead: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        backbone = self.streams.backbone if self.streams is not None else self.backbone
        assert backbone is not None
        self.backbone = backbone
        self.plain = plain_decoder(backbone, self.streams, self.token_sampler)
        self.token_sampler.typical = self.config.typical
        if self.streams is not None:
            self.drafting = StreamDecoder(self.streams, self.config, self.token_sampler)
        if isinstance(self.plain, PlainDecoder):
            self.plain.run_ahead = self._run_ahead
            if self.lookup is not None and self.lookups is not None:
                tree = TreeSpec("best", rows=SIZES[-1])
                self._alone = DraftDecoder(NoDrafter(backbone), tree, self.token_sampler)

    @property
    def forward(self) -> Callable[[mx.array, KVCache], mx.array]:
        """Return what runs consecutive tokens of a prompt."""
        return self.plain.forward if self._plan is None else self._maker_of(self._plan).forward

    def begin(self, prompt: Sequence[int], cache: KVCache) -> None:
        """Let the governor say how an answer to `prompt` begins, behind what `cache` holds."""
        super().begin(prompt, cache)
        self._plan = None
        if self.governor is not None:
            self._plan = self.governor.begin(cache.length + len(prompt) - 1)
        if self._plan is not None:
            self._maker_of(self._plan).stepper.drafter.begin(prompt, cache)
        if self.lookups is not None:
            self.lookups.begin()
        self._found, self._rows = None, 0

    def first_step(self, root: int, cache: KVCache) -> Step:
        """Return the step of `root` alone, plain or to draft a tree."""
        return self._restart(root, cache)

    def step_ahead(self, step: Step, cache: KVCache) -> Step | None:
        """Return the pass after a plain one that is sure to be followed by another."""
        ahead = self.plain.step_ahead(step, cache) if self._made_by is None else None
        self._was_ahead, self._ahead = self._ahead, ahead is not None
        return ahead

    def finish(self, step: Step, cache: KVCache) -> StepResult:
        """Wait for a step and commit what it accepted."""
        maker = self._maker
        maker.lookup = self.lookup
        return maker.finish(step, cache)

    def learn(self, result: StepResult, cache: KVCache, *, wanted: bool) -> None:
        """Let the governor say how the next step is made, and look up what may follow."""
        if not wanted:  # no need to wait for a tree that will not be verified
            result = replace(result, expected=None)
        looked = self._drafted_by if isinstance(self._drafted_by, int) else 0
        expected = self._found.expected(looked - 1) if looked and self._found else 0.0
        self._look_up(wanted=wanted)
        if self.lookups is not None:
            plain = self._made_by is None and self._was_ahead and self._ahead
            self.lookups.after(looked or (0 if plain else None))
            self.lookups.accepted(expected, result.accepted if looked else 0)
        if self.governor is None:
            return
        if isinstance(self._made_by, int):
            self.governor.looked_up(cache.length)
            return
        if self._found is not None and isinstance(self._made_by, StepSetting):
            result = replace(result, expected=self._expected(result, self._made_by, self._found))
        by = self._drafted_by
        self._plan = self.governor.after(
            result, by if isinstance(by, StepSetting) else None, cache.length
        )

    def next_step(self, step: Step, ahead: Step | None, result: StepResult, cache: KVCache) -> Step:
        """Return the next step: of the same kind, or of another one, from the root alone."""
        if self._plan is None:
            if self._rows and ahead is None and self._alone is not None:
                assert self._found is not None
                found = self._found.first(self._rows - 1)
                self._drafted_by = self._made_by = self._rows
                tree = looked_up_tree(mx.array(result.tokens[-1]), found)
                return self._maker_of_drafts().stepper.step(tree, cache)
            if self._made_by is not None:
                return self._restart(result.tokens[-1], cache)
            self._drafted_by = None
            return self.plain.next_step(step, ahead, result, cache)
        if not isinstance(self._made_by, StepSetting):
            return self._restart(result.tokens[-1], cache)
        self._drafted_by, self._made_by = self._made_by, self._plan
        maker = self._maker_of_drafts()
        tree = step.next_tree
        if self._found is not None and self._plan.tree.kind != "product":
            self._drafted_by, found = self._widened(self._drafted_by, self._found)
            if found:
                stepper = self._stepper(self._drafted_by)
                tree = stepper.with_look_up(step, result.tokens[-1], found)
        return maker.stepper.step(tree, cache)

    def pause(self) -> None:
        """Tell the governors that the caller takes over, for as long as it likes."""
        for governor in (self.governor, self.lookups):
            if governor is not None:
                governor.pause()

    def resume(self) -> None:
        """Tell the governors that the caller wants to go on."""
        for governor in (self.governor, self.lookups):
            if governor is not None:
                governor.resume()

    def _look_up(self, *, wanted: bool) -> None:
        """Find what may follow the newest token, and how many rows of it pay by themselves."""
        self._found, self._rows = None, 0
        if self.lookup is None or self.lookups is None or not wanted:
            return
        assert self.backbone is not None
        recurrent = self.backbone.is_recurrent
        rows = SIZES[-1]
        found = self.lookup.continuations(rows - 1, rows - 1, chain=recurrent)
        self._found = found or None
        if self._alone is not None and found:
            self._rows = self.lookups.choose(found)

    def _expected(
        self, result: StepResult, plan: StepSetting, found: Continuations
    ) -> mx.array | None:
        """Return what the next tree should yield: the drafter's own, or that of look-up if it is more."""
        if result.expected is None:
            return None
        assert self.drafting is not None
        return mx.maximum(result.expected, found.expected(self._rows_of(plan) - 1))

    def _rows_of(self, plan: StepSetting) -> int:
        assert self.drafting is not None
        return plan.rows(self.drafting.drafter.depth)

    def _widened(
        self, plan: StepSetting, found: Continuations
    ) -> tuple[StepSetting, Continuations]:
        """Return the plan with as many rows as pay with `found`, and as much of that as it takes.

        More rows are for continuations that have none among the plan's own.
        """
        assert self.governor is not None
        assert self.lookups is not None
        own = self._rows_of(plan)
        tokens, cost = self.governor.worth(plan)
        within = found.expected(own - 1)
        tokens = max(tokens, 1 + within)
        best, chosen = tokens / cost, plan
        for rows in self.lookups.sizes:
            if rows <= own or rows > 2 * (1 + len(found)) or plan.prune is not None:
                continue
            wider = replace(plan, tree=TreeSpec("best", rows=rows))
            more = found.expected(rows - 1) - within
            rate = (tokens + more) / self.governor.worth(wider)[1]
            if rate > best:
                best, chosen = rate, wider
        return chosen, found.first(self._rows_of(chosen) - 1)

    def _restart(self, root: int, cache: KVCache) -> Step:
        self._drafted_by, self._made_by = None, self._plan
        return self._maker.first_step(root, cache)

    @property
    def _maker(self) -> PlainDecoder | DraftDecoder:
        """Return the decoder of the step under way."""
        return self.plain if self._made_by is None else self._maker_of_drafts()

    def _maker_of_drafts(self) -> DraftDecoder:
        if isinstance(self._made_by, StepSetting):
            return self._maker_of(self._made_by)
        assert self._alone is not None
        self._alone.keep_drafts = self.keep_drafts
        return self._alone

    def _maker_of(self, plan: StepSetting) -> DraftDecoder:
        assert self.drafting is not None
        self.drafting.stepper = self._stepper(plan)
        self.drafting.keep_drafts = self.keep_drafts
        return self.drafting

    def _run_ahead(self) -> bool:
        left = self.governor.plain_tokens_ahead() if self.governor is not None else None
        return (left is None or left > 1) and not self._rows

    def _stepper(self, plan: StepSetting) -> Stepper:
        if plan not in self._steppers:
            if self.streams is not None:
                config = plan.config(self.config)
                maker: DraftDecoder = StreamDecoder(self.streams, config, self.token_sampler)
            else:
                assert self.drafting is not None
                maker = DraftDecoder(self.drafting.drafter, plan.tree, self.token_sampler)
            self._steppers[plan] = maker.stepper
        return self._steppers[plan]
