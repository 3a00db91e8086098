"""`specstream doctor --report`: one file with doctor, verify, bench and predictions, for an issue.

Each part is a command run in a process of its own, so that one that crashes is a part of the report,
too. The file is written anew after each, and what the commands printed is kept beside it, so that the
same words again go on where a key, a limit or a crash ended the last attempt:

    report.md      what goes into an issue
    report/        parts.json: what was run; result.json and report.md of bench
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

from ..errors import OutputError
from ..machine import Machine
from ..weights.files import atomic_file
from .part import Part, run, show_line

PARTS_FILE = "parts.json"
TREES = ("chain", "16")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def parts_of(model: str | None, folder: Path) -> list[Part]:
    """Return the parts of a report that is still to be made; bench writes into `folder`."""
    trees = [word for tree in TREES for word in ("--tree", tree)]
    about = () if model is None else ("--model", model)
    bench = ("bench", "--quick", *about, "--output", str(folder), "--no-plots")
    compare = ("doctor", "--chips", "--compare", str(folder / "result.json"))
    return [
        Part("What this machine is", ("doctor", *about), "some seconds"),
        Part(
            "Are the answers the same", ("verify", "--quick", *about, *trees), "about two minutes"
        ),
        Part("Is it faster here", bench, "about two minutes, and ten seconds for the planner"),
        Part("What was predicted for this chip", compare, "some seconds"),
    ]


def write_report(path: Path, model: str | None = None) -> int:
    """Run what the report lacks, writing it after every part; return 1 if answers differ or one failed.

    Raises:
        OutputError: the file or the folder beside it is there already, and is no report to go on with.
        KeyboardInterrupt: a key ended it; the report says what is missing.
    """
    folder = path.with_suffix("")
    parts = _opened(path, folder, model)
    about = ["--model", model] if model else []
    again = shlex.join(["specstream", "doctor", "--report", str(path), *about])
    show_line(
        f"{len(parts)} parts, about five minutes in all; a model that is not here yet is fetched first."
    )
    show_line(f"Ctrl-C keeps what is done; the same command goes on: {again}")
    _save(path, folder, parts, again)
    for number, part in enumerate(parts):
        if part.is_done:
            continue
        words = shlex.join(part.words)
        show_line(f"\n{number + 1} of {len(parts)}, {part.takes}: specstream {words}")
        parts[number] = done = run(_going_on(part, folder))
        _save(path, folder, parts, again)
        if done.end == "key":
            show_line(f"\n{path} holds what is known so far; go on with: {again}")
            raise KeyboardInterrupt
    show_line(f"\nWritten to {path}; read it through, then paste it into an issue.")
    # Where a chip has no published figures there is nothing to compare with: no fault.
    return int(any(not part.is_done or part.status != 0 for part in parts[:-1]))


def _opened(path: Path, folder: Path, model: str | None) -> list[Part]:
    """Return the parts of a new report, or those of one that was begun here with the same words."""
    fresh = parts_of(model, folder)
    if folder == path:
        raise OutputError(f"{path} has no ending; name a file as report.md.")
    taken = next((one for one in (path, folder) if one.exists()), None)
    if taken is None:
        return fresh
    try:
        kept = json.loads((folder / PARTS_FILE).read_text(encoding="utf-8"))
        parts = [Part.from_dict(values) for values in kept["parts"]]
        machine = kept["machine"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise OutputError(
            f"{taken} is there already, and is no report that could be gone on with; name another "
            "file, as report.md."
        ) from None
    asked = [(part.title, part.words) for part in fresh]
    if [(part.title, part.words) for part in parts] != asked or machine != _machine():
        raise OutputError(
            f"{path} was begun with another model, on another machine or with other versions; name "
            "another file."
        )
    if all(part.is_done for part in parts[:-1]):
        raise OutputError(f"{path} is there already and complete; name another file.")
    return parts


def _machine() -> str:
    """Name what must not change within a report; threads and power saving may."""
    m = Machine.read()
    where = f"{m.chip or 'unknown chip'}, {m.system} {m.os_version}"
    return f"{where}; {m.versions}, mlx-specstream {m.mlx_specstream}"


def _going_on(part: Part, folder: Path) -> Part:
    """Return a part with the words that go on with what bench has measured already."""
    from ..bench.result import RESULT_FILE, Result

    result = folder / RESULT_FILE
    if part.words[0] != "bench" or not result.exists():
        return part
    how = "--from" if Result.load(result).complete else "--resume"
    return replace(part, then=("bench", how, str(result), "--no-plots"))


def _save(path: Path, folder: Path, parts: Sequence[Part], again: str) -> None:
    kept = {"machine": _machine(), "parts": [asdict(part) for part in parts]}
    with atomic_file(folder / PARTS_FILE, if_exists="replace") as partial:
        partial.write_text(json.dumps(kept, ensure_ascii=False, indent=1), encoding="utf-8")
    with atomic_file(path, if_exists="replace") as partial:
        partial.write_text(markdown(parts, again), encoding="utf-8")


def markdown(parts: Sequence[Part], again: str = "") -> str:
    """Return the report; the home folder's name is left out of it.

    again: the command that goes on with it where something is missing.
    """
    lines = ["# specstream report", "", f"{date.today().isoformat()}, {_machine()}", ""]
    lines += ["| part | came of it |", "|---|---|"]
    lines += [f"| {part.title} | {part.outcome} |" for part in parts]
    if missing := [part.title.lower() for part in parts if part.end != "itself"]:
        lines += ["", f"**Not complete**: {'; '.join(missing)}. Go on with `{again}`."]
    for part in parts:
        if not part.end:
            continue
        text = _ESCAPES.sub("", part.output).replace(str(Path.home()), "~").rstrip()
        # Of a progress bar, which writes over its line, only what it wrote last.
        lasts = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        text = "\n".join(line.rstrip() for line in lasts)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        words = shlex.join(part.then or part.words)
        lines += ["", f"## {part.title}", "", f"`specstream {words}`: {part.outcome}", ""]
        lines += [fence + "text", text, fence]
    return "\n".join([*lines, ""]).replace(str(Path.home()), "~")
