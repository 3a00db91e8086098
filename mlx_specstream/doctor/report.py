"""`specstream doctor --report`: one file with doctor, verify, bench and predictions, for an issue.

Each part is a command run in a process of its own, so that one that crashes is a part of the
report, too.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError
from ..weights.files import atomic_file

LIMIT_S = 1800.0
TREES = ("chain", "16")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Part:
    """One command of the report and what came of it. status: None if it took too long."""

    title: str
    words: tuple[str, ...]
    status: int | None
    output: str
    seconds: float


def parts_of(model: str | None, folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return the title and words of each command; bench writes into `folder`."""
    trees = [word for tree in TREES for word in ("--tree", tree)]
    about = () if model is None else ("--model", model)
    bench = ("bench", "--quick", *about, "--output", str(folder), "--no-plots")
    compare = ("doctor", "--chips", "--compare", str(folder / "result.json"))
    return [
        ("What this machine is", ("doctor", *about)),
        ("Are the answers the same", ("verify", *about, *trees)),
        ("Is it faster here", bench),
        ("What was predicted for this chip", compare),
    ]


def write_report(path: Path, model: str | None = None) -> int:
    """Run the commands, write their output to `path`; return 1 if answers differ or one failed.

    What bench measured is kept in a folder beside the file, named like it.

    Raises:
        OutputError: the file or the folder is there already.
    """
    folder = path.with_suffix("")
    for taken in (path, folder):
        if taken.exists() or folder == path:
            raise OutputError(f"{taken} is there already; name another file, as report.md.")
    parts = []
    for title, words in parts_of(model, folder):
        print(f"specstream {' '.join(words)}", flush=True)
        parts.append(run(title, words))
    with atomic_file(path, if_exists="error") as partial:
        partial.write_text(markdown(parts), encoding="utf-8")
    print(f"Written to {path}; read it through, then paste it into an issue.")
    # Where a chip has no published figures there is nothing to compare with: no fault.
    return int(any(part.status != 0 for part in parts[:-1]))


def run(title: str, words: Sequence[str], limit_s: float = LIMIT_S) -> Part:
    """Run one command of this package and keep what it prints."""
    started = time.monotonic()
    status: int | None
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_specstream", *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=limit_s, check=False,
        )  # fmt: skip
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        raw: str | bytes = late.output or ""
        status, output = None, raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    return Part(title, tuple(words), status, output, time.monotonic() - started)


def markdown(parts: Sequence[Part]) -> str:
    """Return the report; the home folder's name is left out of it."""
    lines = ["# specstream report", ""]
    for part in parts:
        ended = "took too long" if part.status is None else f"exit status {part.status}"
        text = _ESCAPES.sub("", part.output).replace(str(Path.home()), "~").rstrip()
        # Of a progress bar, which writes over its line, only what it wrote last.
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        lines += [
            f"## {part.title}",
            "",
            f"`specstream {' '.join(part.words)}`: {ended}, {part.seconds:.0f} s",
            "",
            fence + "text",
            text,
            fence,
            "",
        ]
    return "\n".join(lines).replace(str(Path.home()), "~")
