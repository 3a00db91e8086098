"""How long this process has been awake: the clock of whoever has minutes to spend.

A laptop that is closed and a process that is stopped (SIGSTOP, Ctrl-Z) do no work, and the time is
not theirs to pay for. The system's monotonic clock leaves out a machine's sleep, but not a stopped
process. So a thread looks at it every `BEAT_S`, and of a longer silence only `LONGEST_S` counts.
"""

from __future__ import annotations

import threading
import time

BEAT_S = 0.5
LONGEST_S = 3.0  # what the beat may be late for other reasons


class AwakeClock:
    """Counts seconds from the first time it is asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted = 0.0
        self._seen: float | None = None

    def now(self) -> float:
        """Return the seconds counted so far."""
        with self._lock:
            now = time.monotonic()
            if self._seen is None:
                threading.Thread(target=self._beat, name="awake", daemon=True).start()
            else:
                self._counted += min(now - self._seen, LONGEST_S)
            self._seen = now
            return self._counted

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            self.now()


awake_s = AwakeClock().now
"""Seconds of this process's life in which it could work."""
