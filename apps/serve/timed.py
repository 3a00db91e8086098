"""Work on hostile text within a time limit: in a process of its own, which is ended when time is over.

Some of mlx-lm's parsers take time that grows with the square or cube of a text, and llguidance
needs minutes for some small schemas. Neither a regular expression nor a compiler can be
interrupted in a thread, and the former holds up every other one.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

_SCRIPT = Path(__file__).resolve().with_name("timed_work.py")
_START_S = 60.0  # for the first answer of all, imports included


class OutOfTimeError(Exception):
    """The work took longer than its limit, or more memory than there was."""


class FailedError(Exception):
    """The work raised an error, whose class this one names."""


class TimedProcess:
    """Answers questions in a process, begun at the first; a copy has one of its own.

    first: the first question, where the kind of work needs one before all others.
    """

    def __init__(self, kind: Literal["calls", "grammars"], first: Any = None) -> None:
        self.kind = kind
        self.first = first
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> TimedProcess:
        del memo
        return TimedProcess(self.kind, self.first)

    def ask(self, question: Any, limit_s: float) -> Any:
        """Return the answer; for any thread, one after the other.

        Raises:
            OutOfTimeError: there was none in time.
            FailedError: the work failed.
        """
        with self._lock:
            if self._process is None:
                self._process = self._started()
                if self.first is not None:
                    self._answer(self.first, _START_S)
                else:
                    limit_s += _START_S
            return self._answer(question, limit_s)

    def close(self) -> None:
        """End the process; a question that is under way runs out of time."""
        process = self._process
        if process is not None:
            process.kill()

    def _started(self) -> subprocess.Popen[bytes]:
        # In a session of its own, so that Ctrl-C in a terminal is the server's alone.
        return subprocess.Popen(
            [sys.executable, "-I", str(_SCRIPT), self.kind, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _answer(self, question: Any, limit_s: float) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(limit_s, process.kill)
        timer.daemon = True
        timer.start()
        line = b""
        with contextlib.suppress(OSError):  # it has ended
            process.stdin.write(json.dumps([limit_s, question]).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        timer.cancel()
        if not line.endswith(b"\n"):
            self._forget(process)
            raise OutOfTimeError
        answer = json.loads(line)
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer["found"]

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
