"""Decoding that is speculative while that pays and plain while it does not.

Each step is made by one of the two decoders there are, so plain steps are plain decoding, with the
same pipelining:

    speculate ── a plan with another tree: the next step builds it ──┐
        │  ▲─────────────────────────────────────────────────────────┘
        │  │ a plan again: one step of the root alone restarts the streams
        ▼  │
      plain decoding

The decoder changes between steps, where both agree on what is committed and which token comes
next. Decisions rest on past tokens and times alone, so they cannot bias what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import mlx.core as mx

from ..config import DecodeConfig
from ..model.cache import KVCache
from ..speculation.decode import Decoder, StreamDecoder
from ..speculation.drafters.lookup import LookUp
from ..speculation.plain import PlainDecoder, plain_decoder
from ..speculation.result import StepResult
from ..speculation.sampling import TokenSampler
from ..speculation.step import Step, Stepper
from ..speculation.streams import Streams
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

    def plain_tokens_ahead(self) -> int | None:
        """Return how many more plain tokens are certain, None for any number."""

    def pause(self) -> None:
        """Learn that the caller takes over, for as long as it likes."""

    def resume(self) -> None:
        """Learn that the caller wants to go on."""


@dataclass
class AutoDecoder(Decoder):
    """Decodes as its governor says, step by step plainly or with the tree it asks for.

    `config` supplies what plans leave open.

    Raises:
        StreamsError: a tensor of the streams is missing.
        OptionError: the schedule does not fit the streams' mode.
    """

    streams: Streams
    config: DecodeConfig
    token_sampler: TokenSampler
    governor: Governor
    keep_drafts: bool = False
    lookup: LookUp | None = None
    plain: PlainDecoder | StreamDecoder = field(init=False)
    _steppers: dict[StepSetting, Stepper] = field(init=False, default_factory=dict)
    _speculative: StreamDecoder = field(init=False)
    _plan: StepSetting | None = field(init=False, default=None)  # to go on with
    _made_by: StepSetting | None = field(init=False, default=None)  # of the step under way
    _drafted_by: StepSetting | None = field(
        init=False, default=None
    )  # of the tree that it verifies

    def __post_init__(self) -> None:
        self.plain = plain_decoder(self.streams.backbone, self.streams, self.token_sampler)
        if isinstance(self.plain, PlainDecoder):
            self.plain.run_ahead = self._run_ahead
        self._speculative = StreamDecoder(self.streams, self.config, self.token_sampler)

    @property
    def forward(self) -> Callable[[mx.array, KVCache], mx.array]:
        """Return what runs consecutive tokens of a prompt."""
        return self.plain.forward

    def first_step(self, root: int, cache: KVCache) -> Step:
        """Return the step of `root` alone, plain or to draft a tree."""
        self._plan = self.governor.begin(cache.length)
        return self._restart(root, cache)

    def step_ahead(self, step: Step, cache: KVCache) -> Step | None:
        """Return the pass after a plain one that is sure to be followed by another."""
        return self.plain.step_ahead(step, cache) if self._made_by is None else None

    def finish(self, step: Step, cache: KVCache) -> StepResult:
        """Wait for a step and commit what it accepted."""
        return self._maker.finish(step, cache)

    def learn(self, result: StepResult, cache: KVCache, *, wanted: bool) -> None:
        """Let the governor say how the next step is made."""
        if not wanted:  # no need to wait for a tree that will not be verified
            result = replace(result, expected=None)
        self._plan = self.governor.after(result, self._drafted_by, cache.length)

    def next_step(self, step: Step, ahead: Step | None, result: StepResult, cache: KVCache) -> Step:
        """Return the next step: of the same kind, or of the other one, from the root alone."""
        if (self._plan is None) != (self._made_by is None):
            return self._restart(result.tokens[-1], cache)
        self._drafted_by, self._made_by = self._made_by, self._plan
        return self._maker.next_step(step, ahead, result, cache)

    def pause(self) -> None:
        """Tell the governor that the caller takes over, for as long as it likes."""
        self.governor.pause()

    def resume(self) -> None:
        """Tell the governor that the caller wants to go on."""
        self.governor.resume()

    def _restart(self, root: int, cache: KVCache) -> Step:
        self._drafted_by, self._made_by = None, self._plan
        return self._maker.first_step(root, cache)

    @property
    def _maker(self) -> PlainDecoder | StreamDecoder:
        """Return the decoder of the step under way."""
        if self._made_by is None:
            return self.plain
        self._speculative.keep_drafts = self.keep_drafts
        self._speculative.stepper = self._stepper(self._made_by)
        return self._speculative

    def _run_ahead(self) -> bool:
        left = self.governor.plain_tokens_ahead()
        return left is None or left > 1

    def _stepper(self, plan: StepSetting) -> Stepper:
        if plan not in self._steppers:
            decoder = StreamDecoder(self.streams, plan.config(self.config), self.token_sampler)
            self._steppers[plan] = decoder.stepper
        return self._steppers[plan]
