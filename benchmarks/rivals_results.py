"""What was found out about rivals: one JSON file that several runs fill, a cell at a time.

{"cells": {METHOD: {TREE: {TASK: {"prompts": 6, "tokens": ..., "passes": ..., "identical": 6, ...}}}},
 "cost": {"machine": ..., METHOD: {TREE: ...}}, "clock": ..., "parameters": {METHOD: ...}}
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlx_specstream.machine import Machine
from mlx_specstream.weights.files import atomic_file

Cell = dict[str, int]
VERDICTS = ("identical", "near-tie", "mismatch")


class Results:
    """The file at `path`; processes that fill it at the same time do not undo each other."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return all that is known."""
        if not self.path.exists():
            return {}
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return found

    def change(self, add: Callable[[dict[str, Any]], None]) -> None:
        """Let `add` change what is known, and keep it."""
        with self._locked():
            known = self.read()
            add(known)
            with atomic_file(self.path, if_exists="replace") as new:
                new.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")

    def keep(self, *path: str, value: object) -> None:
        """Put a value under a path of names."""

        def add(known: dict[str, Any]) -> None:
            for name in path[:-1]:
                known = known.setdefault(name, {})
            known[path[-1]] = value

        self.change(add)

    def get(self, *path: str) -> Any:
        """Return what is under a path of names, None for nothing."""
        known: Any = self.read()
        for name in path:
            if name not in known:
                return None
            known = known[name]
        return known

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def conditions() -> dict[str, str]:
    """Return the machine, the versions and the date that timings go with."""
    machine = Machine.read()
    return {
        "machine": f"{machine.summary}, {machine.chip}",
        "versions": machine.versions,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def comparable(known: dict[str, Any]) -> dict[str, dict[str, dict[str, Cell]]]:
    """Return METHOD: TREE: TASK: sums over the prompts that every method and tree has answered.

    So whoever was counted further than others is not compared by other texts. A task that not all
    have is left out.
    """
    found: dict[str, Any] = known.get("cells", {})
    every = [tasks for trees in found.values() for tasks in trees.values()]
    names = list(dict.fromkeys(task for tasks in every for task in tasks))
    counts = {task: min(len(tasks.get(task, ())) for tasks in every) for task in names}
    return {
        name: {
            tree: {task: _sum(tasks[task][:count]) for task, count in counts.items() if count}
            for tree, tasks in trees.items()
        }
        for name, trees in found.items()
    }


def _sum(answers: Sequence[tuple[int, int, str]]) -> Cell:
    verdicts = [verdict for _, _, verdict in answers]
    return {
        "prompts": len(answers),
        "tokens": sum(tokens for tokens, _, _ in answers),
        "passes": sum(passes for _, passes, _ in answers),
        **{name: verdicts.count(name) for name in VERDICTS},
    }


def tokens_per_pass(cells: dict[str, Cell], task: str | None = None) -> float | None:
    """Return a tree's tokens per pass of one task, or of all; None where they are not known."""
    chosen = [cell for name, cell in cells.items() if task in (None, name)]
    passes = sum(cell["passes"] for cell in chosen)
    return sum(cell["tokens"] for cell in chosen) / passes if passes else None
