"""Whether a batch speculates: drafts compete with the other requests for the same rows.

A pass for four requests reads the weights once for all of them, drafts or not. Where rows are dear,
as on a CPU or on quantised weights beyond a few rows, a plain batch can be the faster one, and
how many requests share a pass changes by the second. So both ways are timed while they work, for
every number of requests, and the faster one is taken:

    speculate for a while ──► plain for a few passes ──► the faster, the other now and then

What is decided rests on times and tokens that are past, and never changes what is written.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import DecodeConfig
    from ..loading.load import StreamModel
    from ..speculation.streams import Streams

TRIAL = 6  # passes of a kind, before it is judged or tried again
FIRST_PAUSE = 64  # passes until the slower way is tried again,
LONGEST_PAUSE = 1024  # twice as many after every trial that changed nothing
MARGIN = 1.03  # by which speculation must be faster
_SMOOTHING = 0.15  # weight of the newest pass
_LONGEST = 3.0  # a pass that took this much longer than usual was interrupted


@dataclass
class Way:
    """One way of decoding a number of requests: smoothed seconds and tokens of a pass."""

    passes: int = 0
    seconds: float = 0.0
    tokens: float = 0.0

    def take(self, seconds: float, tokens: int) -> None:
        """Take in a pass."""
        if self.passes:
            seconds = min(seconds, _LONGEST * self.seconds)
        weight = max(_SMOOTHING, 1 / (1 + self.passes))
        self.seconds += weight * (seconds - self.seconds)
        self.tokens += weight * (tokens - self.tokens)
        self.passes += 1

    @property
    def rate(self) -> float:
        """Return tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)


@dataclass
class SpeedComparison:
    """Both ways timed for one number of requests. speculating: which one is taken now.

    left: passes until this way is judged, while it is on trial, else until the other one is tried.
    pause: passes between trials.
    """

    speculative: Way = field(default_factory=Way)
    plain: Way = field(default_factory=Way)
    speculating: bool = True
    on_trial: bool = False
    left: int = TRIAL
    pause: int = FIRST_PAUSE

    def take(self, seconds: float, tokens: int, *, speculated: bool) -> None:
        """Take in a pass, and change ways where it is time to."""
        (self.speculative if speculated else self.plain).take(seconds, tokens)
        if speculated != self.speculating:
            return
        self.left -= 1
        if self.left > 0 and (self.on_trial or not self._falls_behind()):
            return
        if not self.on_trial:
            self.speculating, self.on_trial, self.left = not self.speculating, True, TRIAL
            self._fresh_way()
            return
        better = self.speculative.rate >= MARGIN * self.plain.rate
        self.pause = (
            FIRST_PAUSE if better == self.speculating else min(2 * self.pause, LONGEST_PAUSE)
        )
        self.speculating, self.on_trial, self.left = better, False, self.pause

    def _falls_behind(self) -> bool:
        """Tell whether the way taken now has become slower than the other one was."""
        taken, other = self.plain, self.speculative
        if self.speculating:
            taken, other = other, taken
        return other.passes > 0 and taken.rate < 0.9 * other.rate

    def _fresh_way(self) -> None:
        """Forget how the way to be tried did the last time."""
        if self.speculating:
            self.speculative = Way()
        else:
            self.plain = Way()


@dataclass
class BatchGovernor:
    """Chooses the way of a batch, pass by pass. clock: seconds."""

    clock: Callable[[], float] = time.perf_counter
    comparisons: dict[int, SpeedComparison] = field(default_factory=dict)
    _last_pass_at: float | None = None
    _last_kind: tuple[int, bool] | None = None

    def speculates(self, requests: int) -> bool:
        """Tell whether the next pass of so many requests drafts."""
        return self.comparisons.setdefault(requests, SpeedComparison()).speculating

    def after(self, requests: int, tokens: int, *, speculated: bool, undisturbed: bool) -> None:
        """Take in a pass that is done: its requests and their tokens.

        speculated: it verified drafts. undisturbed: nobody joined, left or was read in meanwhile.
        Passes count if the one before was of the same kind, so that a whole period is timed.
        """
        last, self._last_pass_at = self._last_pass_at, self.clock()
        kind = (requests, speculated)
        alike, self._last_kind = self._last_kind == kind, kind if undisturbed else None
        if last is not None and alike and undisturbed:
            comparison = self.comparisons.setdefault(requests, SpeedComparison())
            comparison.take(self._last_pass_at - last, tokens, speculated=speculated)


def governor_for(model: StreamModel, config: DecodeConfig | None) -> BatchGovernor | None:
    """Return a model's governor, which lives as long as the model and remembers.

    None where a tree was asked for, measuring is turned off, or there is nothing to draft with.
    """
    from ..planner.costs import is_planned

    if model.streams is None or not is_planned(config):
        return None
    return _governors.setdefault(model.streams, BatchGovernor())


_governors: weakref.WeakKeyDictionary[Streams, BatchGovernor] = weakref.WeakKeyDictionary()
