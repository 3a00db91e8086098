"""A real terminal for tests: a program in tmux, its keys and its screen."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

PATIENCE_S = 120.0
needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")


class Terminal:
    """`specstream` with some arguments in a terminal of its own."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        width: int = 80,
        height: int = 24,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.socket = str(folder / "tmux.sock")
        self.status = folder / "status"
        words = [sys.executable, "-m", "mlx_specstream.cli", *arguments]
        variables = [f"{name}={value}" for name, value in (env or {}).items()]
        line = f"trap : INT; env {shlex.join(variables)} {shlex.join(words)}; echo $? > {self.status}; sleep 60"
        size = ["-x", str(width), "-y", str(height)]
        self._tmux("-f", os.devnull, "new-session", "-d", "-s", "chat", *size, "sh", "-c", line)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server")

    def keys(self, *keys: str) -> None:
        """Press keys, as tmux names them (`Enter`, `C-c`, `M-Enter`), or type text."""
        for key in keys:
            self._tmux("send-keys", "-t", "chat", key)

    def line(self, text: str) -> None:
        """Type a text and send it."""
        self._tmux("send-keys", "-l", "-t", "chat", text)
        self.keys("Enter")

    def paste(self, text: str) -> None:
        """Paste a text as a terminal does, in brackets if the program asked for them."""
        self._tmux("set-buffer", text)
        self._tmux("paste-buffer", "-p", "-t", "chat")

    def resize(self, width: int, height: int) -> None:
        """Change the terminal's size."""
        self._tmux("resize-window", "-t", "chat", "-x", str(width), "-y", str(height))

    def screen(self) -> str:
        """Return what is on the screen."""
        return self._tmux("capture-pane", "-p", "-t", "chat").rstrip("\n")

    def everything(self, *, colours: bool = False) -> str:
        """Return the screen and all that scrolled away above it, wrapped lines joined."""
        options = ["-e"] if colours else []
        text = self._tmux("capture-pane", "-p", "-J", "-S", "-", "-t", "chat", *options)
        return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()

    def wait(self, pattern: str, *, count: int = 1) -> str:
        """Wait until everything shown holds `pattern` at least `count` times; return it."""
        deadline = time.monotonic() + PATIENCE_S
        while len(re.findall(pattern, text := self.everything(), re.MULTILINE)) < count:
            assert time.monotonic() < deadline, f"{pattern!r} never came:\n{text}"
            time.sleep(0.05)
        return text

    def exit_status(self) -> int:
        """Wait for the program's end and return its status."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.status.is_file() or not self.status.read_text().strip():
            assert time.monotonic() < deadline, f"it never ended:\n{self.everything()}"
            time.sleep(0.05)
        return int(self.status.read_text())

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self.socket, *words], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
