"""A part of a report: one command in a process of its own, watched, bounded and stopped politely."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from io import TextIOWrapper
from typing import IO, Any, Literal

LIMIT_S = 1800.0
PATIENCE_S = 30.0
"""What a command that was told to stop has, to say what it knows."""

End = Literal["", "itself", "limit", "key"]


@dataclass(frozen=True)
class Part:
    """One command of the report and what came of it.

    takes: how long it should take, in words. end: what ended it, "" before it was run; `status` is the
    command's own, where it ended itself. then: the words that went on with it, if other ones.
    """

    title: str
    words: tuple[str, ...]
    takes: str = ""
    end: End = ""
    status: int | None = None
    output: str = ""
    seconds: float = 0.0
    then: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Tell whether it ran to its end with an answer, which may be no."""
        return self.end == "itself" and self.status in (0, 1)

    @property
    def outcome(self) -> str:
        """Return what came of it, in a few words."""
        if not self.end:
            return "not run"
        statuses = {0: "done", 1: "done, and something is wrong: exit status 1"}
        otherwise = f"ended without an answer: exit status {self.status}"
        how = {
            "itself": statuses.get(self.status or 0, otherwise),
            "limit": "stopped, because it took too long",
            "key": "interrupted",
        }[self.end]
        return f"{how}, {self.seconds:.0f} s"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Part:
        """Make one from its JSON form.

        Raises:
            TypeError, KeyError: it is none.
        """
        names = [field.name for field in fields(cls)]
        made = {name: values[name] for name in names}
        return cls(**{**made, "words": tuple(made["words"]), "then": tuple(made["then"])})


def show_line(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def run(part: Part, limit_s: float = LIMIT_S, show: Callable[[str], None] = show_line) -> Part:
    """Run a part's command, showing what it prints; a limit or Ctrl-C ends it, and what it said stays.

    It is told to stop as by Ctrl-C first, at which verify and bench tell what they have found so far.
    """
    began = time.monotonic()
    lines: list[str] = []
    end: End = "itself"
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "mlx_specstream", *(part.then or part.words)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,  # so that a key reaches it once, from here
    )  # fmt: skip
    assert child.stdout is not None
    reader = threading.Thread(target=_read, args=(child.stdout, lines, show), daemon=True)
    reader.start()
    try:
        child.wait(limit_s)
    except subprocess.TimeoutExpired:
        end = "limit"
    except KeyboardInterrupt:
        end = "key"
    finally:
        _stop(child)
    reader.join(PATIENCE_S)  # what it started itself might still hold the pipe
    status = child.returncode if end == "itself" else None
    seconds = time.monotonic() - began
    return replace(part, end=end, status=status, output="".join(lines), seconds=seconds)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Have a command end, politely and then not, if it has not."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(PATIENCE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            child.kill()
            child.wait()


def _read(pipe: IO[bytes], lines: list[str], show: Callable[[str], None]) -> None:
    with TextIOWrapper(pipe, "utf-8", "replace", newline="\n") as text:
        for line in text:
            lines.append(line)
            show("  " + line.rstrip("\r\n").rpartition("\r")[2])
