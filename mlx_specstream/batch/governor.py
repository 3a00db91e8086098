"""Whether a batch speculates: drafts compete with the other requests for the same rows.

A pass for four requests reads the weights once for all of them, drafts or not. Where rows are dear,
as on a CPU or on quantised weights beyond a few rows, a plain batch can be the faster one, and
how many requests share a pass changes by the second. So both ways are timed while they work, for
every number of requests, and the faster one is taken:

    speculate for a while ──► plain for a few passes ──► the faster, the other now and then

Beside either way what was looked up in the texts is verified as far as it pays for all that share the
pass (`planner/lookup.py`): one request's long match makes the chains of all of them longer.

What is decided rests on times and tokens that are past, and never changes what is written.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..planner.costs import is_planned
from ..planner.lookup import DEAR_ROWS, SIZES, LookUpPlanner, lookup_planner
from ..speculation.drafters.lookup import Continuations

if TYPE_CHECKING:
    from ..config import DecodeConfig
    from ..loading.load import StreamModel
    from ..model.backbone import Backbone
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

    def take(self, seconds: float, tokens: int, dearer: float = 1.0) -> None:
        """Take in a pass, which was thought to cost `dearer` times one without look-up."""
        if self.passes:
            seconds = min(seconds, _LONGEST * self.seconds * dearer)
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

    def way(self, *, speculated: bool) -> Way:
        """Return one of both ways."""
        return self.speculative if speculated else self.plain

    def take(self, seconds: float, tokens: int, *, speculated: bool, dearer: float = 1.0) -> None:
        """Take in a pass, and change ways where it is time to; `dearer` as for `Way.take`."""
        self.way(speculated=speculated).take(seconds, tokens, dearer)
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
    """Chooses the way of a batch, pass by pass, and how much that was looked up is verified.

    clock: seconds; None times nothing, and every pass drafts. slope: what another row is thought to
    cost in passes of one row. sizes: rows of chains with look-up to choose from, ascending.
    """

    clock: Callable[[], float] | None = time.perf_counter
    slope: float = DEAR_ROWS
    sizes: Sequence[int] = SIZES
    comparisons: dict[int, SpeedComparison] = field(default_factory=dict)
    lookups: dict[tuple[int, int], LookUpPlanner] = field(default_factory=dict)
    _last_pass_at: float | None = None
    _last_kind: tuple[int, bool] | None = None

    @property
    def longest(self) -> int:
        """Return the most drafts of a chain that look-up may have."""
        return self.sizes[-1] - 1

    def speculates(self, requests: int) -> bool:
        """Tell whether the next pass of so many requests drafts."""
        return self.clock is None or self._comparison(requests).speculating

    def rows(self, drafted: int, found: Sequence[Continuations]) -> int:
        """Return the rows of the next pass's chains, 0 if what was looked up is to widen none.

        drafted: how many drafts streams have made for each chain. found: what may follow each text.
        """
        requests, tokens = len(found), 1.0
        if drafted and requests in self.comparisons:
            tokens = self.comparisons[requests].speculative.tokens / requests
        return self._lookup(requests, drafted).choose(*found, tokens=tokens)

    def begin(self) -> None:
        """Learn that a request has come, whose answer may quote more than others do."""
        for planner in self.lookups.values():
            planner.begin()

    def after(
        self,
        requests: int,
        tokens: int,
        *,
        speculated: bool,
        undisturbed: bool,
        drafted: int = 0,
        widened: int = 0,
    ) -> None:
        """Take in a pass that is done: its requests and their tokens.

        speculated: it drafted. undisturbed: nobody joined, left or was read in meanwhile. drafted:
        streams' drafts of each chain that it verified. widened: rows of its chains if look-up made
        them longer, else 0. Passes count if the one before was of the same kind, so that a whole
        period is timed.
        """
        if self.clock is None:
            return
        last, self._last_pass_at = self._last_pass_at, self.clock()
        kind = (requests, speculated)
        alike, self._last_kind = self._last_kind == kind, kind if undisturbed else None
        if last is not None and alike and undisturbed:
            seconds, lookup = self._last_pass_at - last, self._lookup(requests, drafted)
            dearer = lookup.cost(widened) if widened else 1.0
            lookup.timed(widened, seconds)
            self._comparison(requests).take(seconds, tokens, speculated=speculated, dearer=dearer)

    def accepted(self, requests: int, promised: float, accepted: int) -> None:
        """Take in how many drafts of look-up alone one chain kept, and how many it should have kept."""
        self._lookup(requests, 0).accepted(promised, accepted)

    def _comparison(self, requests: int) -> SpeedComparison:
        return self.comparisons.setdefault(requests, SpeedComparison())

    def _lookup(self, requests: int, drafted: int) -> LookUpPlanner:
        """Return what plans look-up beside so many requests whose chains have so many drafts."""
        if (requests, drafted) not in self.lookups:
            base = 1 + drafted
            # A row more of each chain is a row more for each request, of a pass that is dearer anyway.
            slope = self.slope * requests / (1 + self.slope * (requests * base - 1))
            self.lookups[requests, drafted] = LookUpPlanner(slope, self.sizes, None, base=base)
        return self.lookups[requests, drafted]


def governor_for(model: StreamModel, config: DecodeConfig | None) -> BatchGovernor | None:
    """Return a model's governor, which lives as long as the model and remembers.

    None where a tree was named. Where measuring is turned off it times nothing.
    """
    if config is not None and config.tree.kind != "auto":
        return None
    key: Streams | Backbone = model.backbone if model.streams is None else model.streams
    if key not in _governors:
        clock = time.perf_counter if is_planned(config) else None
        lookups = lookup_planner(model)
        _governors[key] = BatchGovernor(clock, lookups.slope, lookups.sizes)
    return _governors[key]


_governors: weakref.WeakKeyDictionary[Streams | Backbone, BatchGovernor]
_governors = weakref.WeakKeyDictionary()
