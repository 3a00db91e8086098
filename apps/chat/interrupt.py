"""The terminal while no line is edited: Ctrl-C asks an answer to stop, and typed keys wait."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

BRACKET_PASTES, LEAVE_PASTES = "\x1b[?2004h", "\x1b[?2004l"
IMPATIENT = 3  # presses of Ctrl-C that do not wait for the end of the running pass


def can_move_cursor() -> bool:
    """Tell whether the terminal is more than a printer."""
    return os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


class CtrlC:
    """Counts presses of Ctrl-C; true once there was one."""

    def __init__(self) -> None:
        self.presses = 0

    def __call__(self) -> bool:
        return self.presses > 0

    def press(self, signum: int, frame: FrameType | None) -> None:
        """Note a press; the third one raises KeyboardInterrupt wherever the program is."""
        del signum, frame
        self.presses += 1
        if self.presses >= IMPATIENT:
            raise KeyboardInterrupt


@contextmanager
def while_answering() -> Iterator[CtrlC]:
    """Turn Ctrl-C into a question to ask, for a while."""
    pressed = CtrlC()
    before = signal.signal(signal.SIGINT, pressed.press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _terminate(signum: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + signum)


@contextmanager
def typing_ahead() -> Iterator[None]:
    """Let typed keys wait unseen for the next prompt, as the line editor expects them.

    Enter arrives as CR, Ctrl-D as a key, pasted text in brackets. The terminal is put right at
    the end, also when the program is told to terminate.
    """
    signal.signal(signal.SIGTERM, _terminate)
    attributes = termios.tcgetattr(sys.stdin)
    quiet = [attributes[0] & ~termios.ICRNL, *attributes[1:3]]
    quiet += [attributes[3] & ~(termios.ECHO | termios.ICANON), *attributes[4:]]
    try:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
        print(BRACKET_PASTES, end="", flush=True)
        yield
    finally:
        print(LEAVE_PASTES, end="", flush=True)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, attributes)
