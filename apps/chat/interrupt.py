"""The terminal while the model answers: Ctrl-C asks it to stop, and nothing that is typed shows.

What is typed ahead waits for the next prompt.
"""

from __future__ import annotations

import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

IMPATIENT = 3  # presses of Ctrl-C that do not wait for the end of the running pass


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
    """Turn Ctrl-C into a question to ask and keep typed characters from showing, for a while."""
    pressed = CtrlC()
    before = signal.signal(signal.SIGINT, pressed.press)
    try:
        with without_echo():
            yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def without_echo() -> Iterator[None]:
    """Keep typed characters from showing; they wait to be read."""
    if not sys.stdin.isatty():
        yield
        return
    attributes = termios.tcgetattr(sys.stdin)
    quiet = [*attributes[:3], attributes[3] & ~(termios.ECHO | termios.ICANON), *attributes[4:]]
    try:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
        yield
    finally:
        with suppress(termios.error, OSError):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, attributes)
