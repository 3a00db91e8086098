"""Whether a drafter other than streams pays: tried at the beginning of an answer, and timed.

    begin an answer ──► draft ──► slower than plain decoding? ──► plain decoding until it ends, and
                          ▲              │ no                     in the next 0, 1, 2, 4 ... answers
                          └──────────────┘

What a draft model, heads or a layer of its own cost is found out by the clock as they work, beside
a plain token that was timed before. A drafter that reads the text loses its thread where decoding
is plain, so it is not taken up again within an answer. Decisions rest on past times and tokens
alone, and never change what is written.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from ..config import DecodeConfig, TreeSpec
from ..speculation.result import StepResult
from .costs import is_planned
from .lookup import LONGEST
from .measure import LONG_CONTEXT
from .planner import LONG
from .settings import StepSetting
from .timing import PlainTokens

if TYPE_CHECKING:
    from ..loading.load import StreamModel
    from ..model.backbone import Backbone

TRIAL = 6  # steps before a drafter is judged
PATIENCE = 1.2  # so much of a gain may be missing, shared out over the steps seen
RECENT = 24  # steps that are looked at
LONGEST_WAIT = 64  # answers decoded plainly between two trials
SHORT_CONTEXT = 256  # the shortest that a plain token is timed at
SMOOTHING = 0.1  # weight of the newest plain token


@dataclass
class DrafterTrial:
    """A governor (`adaptive.py`) for one drafter over one model; lives across answers.

    plan: the tree that it drafts. time_plain: returns the seconds of a plain token behind so many
    tokens. plain_s: what is known of that, by context. clock: seconds.
    """

    plan: StepSetting
    time_plain: Callable[[int], float]
    clock: Callable[[], float] = time.perf_counter
    plain_s: dict[int, float] = field(default_factory=dict)
    _context: int = SHORT_CONTEXT  # of `plain_s`, for this answer
    _is_drafting: bool = True
    # Of recent steps: their price in plain tokens, and what they yielded.
    _costs: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _tokens: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    _answers: int = 0  # to be decoded plainly before the next trial
    _wait: int = 0  # of them, if the trial under way fails
    _last_step: float | None = None  # when it was done; None if this one is not to be timed
    _paused: float = 0.0

    def begin(self, length: int) -> StepSetting | None:
        """Draft, unless a trial failed not long ago."""
        self._context = min(LONG_CONTEXT, max(SHORT_CONTEXT, 1 << length.bit_length()))
        self._last_step = None
        if not self._is_drafting:
            self._costs.clear()
            self._tokens.clear()
        self._is_drafting = not self._answers
        if not self._is_drafting:
            self._answers -= 1
            return None
        if self._context not in self.plain_s:
            self.plain_s[self._context] = self.time_plain(self._context)
        return self.plan

    def after(
        self, result: StepResult, drafted_by: StepSetting | None, length: int
    ) -> StepSetting | None:
        """Take in a step and tell whether drafting still pays."""
        del length
        last, self._last_step = self._last_step, self.clock()
        known = self.plain_s.get(self._context)
        if last is None or known is None:
            return self.plan if self._is_drafting else None
        seconds = self._last_step - last
        if not self._is_drafting:
            self.plain_s[self._context] += SMOOTHING * (min(seconds, LONGEST * known) - known)
            return None
        if drafted_by is not None:
            self._costs.append(seconds / known)
            self._tokens.append(len(result.tokens))
        steps = len(self._costs)
        if steps >= TRIAL:
            if self.gain >= 1:
                self._wait = 0
            elif self.gain < 1 - PATIENCE / steps:
                self._is_drafting, self._last_step = False, None
                self._answers, self._wait = self._wait, min(max(1, 2 * self._wait), LONGEST_WAIT)
        return self.plan if self._is_drafting else None

    @property
    def gain(self) -> float:
        """Return the recent steps' speed, in that of plain decoding."""
        tokens, cost = self.worth(self.plan)
        return tokens / cost

    def worth(self, plan: StepSetting) -> tuple[float, float]:
        """Return what recent steps yielded, and their price in plain tokens; other trees are not tried."""
        if plan != self.plan:
            return 1.0, inf
        if not self._costs:
            return 1.0, 1.0
        return statistics.mean(self._tokens), statistics.median(self._costs)

    def looked_up(self, length: int) -> None:
        """Note a step of look-up alone, in place of a plain one, whose time tells nothing."""
        del length
        self._last_step = None

    def plain_tokens_ahead(self) -> int | None:
        """Say that plain decoding goes on to the end."""
        return None

    def pause(self) -> None:
        """Note when the caller takes over."""
        self._paused = self.clock()

    def resume(self) -> None:
        """Do not time the step under way if the caller was long."""
        if self.clock() - self._paused > LONG * self.plain_s.get(self._context, inf):
            self._last_step = None


def drafter_trial(model: StreamModel, tree: TreeSpec, config: DecodeConfig) -> DrafterTrial | None:
    """Return the trial of a model's drafter, which remembers as long as the model lives.

    None where a tree was named, measuring is turned off, or there are several processes.
    """
    if not is_planned(config):
        return None
    known = _trials.setdefault(model.backbone, {})
    kind = (type(model.drafter).__name__, tree)
    if kind not in known:
        known[kind] = DrafterTrial(StepSetting(tree), _plain_timer(weakref.ref(model.backbone)))
    return known[kind]


def _plain_timer(backbone: weakref.ref[Backbone]) -> Callable[[int], float]:
    """Return what times plain tokens of a model, without keeping it alive."""

    def time_plain(context: int) -> float:
        from mlx_lm.generate import wired_limit  # late: it takes a while to import

        timed = backbone()
        assert timed is not None
        tokens = PlainTokens(timed, None, time.perf_counter)
        with wired_limit(timed.model):
            tokens.sample(context)  # warms up
            return min(tokens.sample(context) for _ in range(2))

    return time_plain


_trials: weakref.WeakKeyDictionary[Backbone, dict[tuple[str, TreeSpec], DrafterTrial]]
_trials = weakref.WeakKeyDictionary()
