"""Whether other programs keep the machine busy, so that what is timed means little."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

STAT = Path("/proc/stat")
BUSY_CORES, BUSY_SHARE = 0.25, 0.1  # of a core, or of all cores: the larger one counts
LOOK_S = 0.1


@dataclass(frozen=True)
class Usage:
    """Seconds of computing so far. all_s: of every program, None where the system does not tell."""

    clock_s: float
    own_s: float
    all_s: float | None

    @classmethod
    def read(cls) -> Usage:
        """Read the clocks."""
        own = os.times()
        return cls(time.monotonic(), own.user + own.system, _of_all())


@dataclass(frozen=True)
class Watch:
    """What other programs compute from the making of this on."""

    begun: Usage = field(default_factory=Usage.read)

    @property
    def other_cores(self) -> float:
        """Return how many cores other programs kept busy, on average.

        Where the system does not count that, its load average stands in, less what is our own.
        """
        now = Usage.read()
        seconds = max(now.clock_s - self.begun.clock_s, 1e-3)
        if now.all_s is None or self.begun.all_s is None:
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
            return max(0.0, load - now.own_s / 60)
        return max(0.0, now.all_s - self.begun.all_s - now.own_s + self.begun.own_s) / seconds

    @property
    def is_busy(self) -> bool:
        """Tell whether that is enough to bend what is timed."""
        return is_busy(self.other_cores, os.cpu_count() or 1)

    def sentence(self) -> str:
        """Return the warning for a busy machine, empty for a quiet one."""
        return busy_sentence(self.other_cores, os.cpu_count() or 1)


def is_busy(other_cores: float, cores: int) -> bool:
    """Tell whether so many cores of `cores` in others' use bend what is timed."""
    return other_cores > max(BUSY_CORES, BUSY_SHARE * cores)


def busy_sentence(other_cores: float, cores: int) -> str:
    """Return the warning for a busy machine, empty for a quiet one."""
    if not is_busy(other_cores, cores):
        return ""
    return f"other programs kept {other_cores:.1f} of {cores} cores busy, so times are uncertain."


def is_quiet() -> bool:
    """Tell whether other programs leave the machine alone at this moment."""
    watch = Watch()
    time.sleep(LOOK_S)
    return not watch.is_busy


def _of_all() -> float | None:
    """Return the seconds that all cores have computed; programs that give way (nice) do not count."""
    try:
        words = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, _, system, _, _, irq, softirq, steal = map(int, words[1:9])
        return (user + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
