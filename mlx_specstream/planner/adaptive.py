"""The loop that changes its mind: speculative while that pays, plain while it does not.

It consists of the two loops there are, each run as it is, so that parked decoding *is* plain
decoding, with the same pipelining and nothing added but a look at the result on the host:

    speculate ── a plan with another tree: the next step builds it ──┐
        │  ▲─────────────────────────────────────────────────────────┘
        │  │ a plan again: one step of the root alone restarts the streams
        ▼  │
      plain decoding

Every switch happens between steps, where both loops agree on what is committed and which token
comes next. Decisions rest on past tokens and times alone, so they cannot bias what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..config import DecodeConfig
from ..model.cache import KVCache
from ..model.prefill import PREFILL_CHUNK, ChunkSize
from ..speculation.decode import StreamDecoder
from ..speculation.plain import PlainDecoder, plain_decoder
from ..speculation.result import StepResult
from ..speculation.sampling import TokenChooser
from ..speculation.step import Stepper
from ..speculation.streams import Streams
from .settings import Plan


class Governor(Protocol):
    """Decides between steps how to go on. None stands for plain decoding."""

    def begin(self, length: int) -> Plan | None:
        """Return the plan to begin an answer with, after `length` committed tokens."""

    def after(self, result: StepResult, drafted_by: Plan | None, length: int) -> Plan | None:
        """Take in a step's result and return the plan to go on with.

        drafted_by: the plan whose tree was verified, None for a step without drafts.
        """

    def parked_for(self) -> int | None:
        """Return how many more plain tokens are certain, None for any number."""

    def pause(self) -> None:
        """Learn that the caller takes over, for as long as it likes."""

    def resume(self) -> None:
        """Learn that the caller wants to go on."""


@dataclass
class AutoDecoder:
    """Decodes as its governor says, with the interface of `StreamDecoder` and `PlainDecoder`.

    `config` supplies what plans leave open.

    Raises:
        StreamsError: a tensor of the streams is missing.
        OptionError: the schedule does not fit the streams' mode.
    """

    streams: Streams
    config: DecodeConfig
    chooser: TokenChooser
    governor: Governor
    keep_drafts: bool = False
    plain: PlainDecoder | StreamDecoder = field(init=False)
    _steppers: dict[Plan, Stepper] = field(init=False, default_factory=dict)
    _speculative: StreamDecoder = field(init=False)

    def __post_init__(self) -> None:
        self.plain = plain_decoder(self.streams.backbone, self.streams, self.chooser)
        self._speculative = StreamDecoder(self.streams, self.config, self.chooser)

    def prefill(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        on_progress: Callable[[int, int], None] | None = None,
        chunk: ChunkSize = PREFILL_CHUNK,
    ) -> None:
        """Append all of `tokens` to the committed text; the last prompt token is not for here."""
        self.plain.prefill(tokens, cache, on_progress, chunk)

    def steps(
        self, root: int, cache: KVCache, more: Callable[[StepResult], bool]
    ) -> Iterator[StepResult]:
        """Yield step after step from `root`, as `StreamDecoder.steps` does.

        Raises:
            ModelError: the model computed NaN.
        """
        turn = _Turn(self.governor, more, cache, self.governor.begin(cache.length))
        while True:
            if turn.plan is None:
                steps = self._plainly(turn, root)
            else:
                steps = self._speculatively(turn, root)
            for result in steps:
                root = result.tokens[-1]
                self.governor.pause()
                yield result
                self.governor.resume()
            if not turn.wanted:
                return

    def _plainly(self, turn: _Turn, root: int) -> Iterator[StepResult]:
        """Decode plainly until the governor has a plan."""

        def more(result: StepResult) -> bool:
            return turn.go_on(result, None) and turn.plan is None

        if isinstance(self.plain, PlainDecoder):
            return self.plain.steps(root, turn.cache, more, self._run_ahead)
        return self.plain.steps(root, turn.cache, more)

    def _run_ahead(self) -> bool:
        left = self.governor.parked_for()
        return left is None or left > 1

    def _speculatively(self, turn: _Turn, root: int) -> Iterator[StepResult]:
        """Decode speculatively until the governor has no plan, with the trees it asks for."""
        decoder = self._speculative
        decoder.keep_drafts = self.keep_drafts
        assert turn.plan is not None
        decoder.stepper = self._stepper(turn.plan)
        verified: Plan | None = None  # a restart's root was drafted by nobody
        building = turn.plan

        def more(result: StepResult) -> bool:
            nonlocal verified, building
            on = turn.go_on(result, verified)
            if not on or turn.plan is None:
                return False
            verified, building = building, turn.plan
            decoder.stepper = self._stepper(building)
            return True

        return decoder.steps(root, turn.cache, more)

    def _stepper(self, plan: Plan) -> Stepper:
        if plan not in self._steppers:
            decoder = StreamDecoder(self.streams, plan.config(self.config), self.chooser)
            self._steppers[plan] = decoder.stepper
        return self._steppers[plan]


@dataclass
class _Turn:
    """One answer under way: whether more is wanted, and the plan to go on with."""

    governor: Governor
    more: Callable[[StepResult], bool]
    cache: KVCache
    plan: Plan | None
    wanted: bool = True

    def go_on(self, result: StepResult, drafted_by: Plan | None) -> bool:
        """Tell whether another step is wanted, and let the governor say how it is made."""
        self.wanted = self.more(result)
        if not self.wanted:  # nobody is to wait for a tree that is not verified any more
            result = replace(result, expected=None)
        self.plan = self.governor.after(result, drafted_by, self.cache.length)
        return self.wanted
