"""The section of docs/rivals.md that measurements make: tables, conditions, and who beats whom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.rivals_field import FIELD, OURS, TREES
from benchmarks.rivals_results import VERDICTS, comparable, tokens_per_pass
from mlx_specstream.errors import DataError

BEGIN, END = "<!-- rivals: begin -->", "<!-- rivals: end -->"
NONE = "–"
NAMES = {"chain4": "chain"}


def table(known: dict[str, Any]) -> list[str]:
    """Return the section's lines.

    Raises:
        DataError: nothing has been counted.
    """
    found = comparable(known)
    if not any(tasks for trees in found.values() for tasks in trees.values()):
        raise DataError(
            "there is no task that every method has answered; run benchmarks.rivals --count first."
        )
    # Several processes may have filled the cells, in any order.
    cells = {name: found[name] for name in dict.fromkeys([*FIELD, *found]) if name in found}
    known = {**known, "cells": cells}
    return [
        *_conditions(known),
        "",
        *_overall(known),
        "",
        "Tokens per pass by task, as a chain / with 8 rows / with 16 rows:",
        "",
        *_by_task(cells),
        "",
        *_beaten(cells),
        *_clock(known),
    ]


def write_section(page: Path, lines: list[str]) -> None:
    """Put lines between the page's marks.

    Raises:
        DataError: it has none.
    """
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise DataError(f"{page} has no {BEGIN} and {END}; name docs/rivals.md.")
    section = "\n".join([BEGIN, *lines, END])
    page.write_text(pattern.sub(lambda _: section, text), encoding="utf-8")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _conditions(known: dict[str, Any]) -> list[str]:
    """Say what was counted and where it was timed."""
    counted = [
        c for trees in known["cells"].values() for tasks in trees.values() for c in tasks.values()
    ]
    a_task = sorted({cell["prompts"] for cell in counted})
    prompts = " to ".join(str(n) for n in dict.fromkeys((a_task[0], a_task[-1])))
    verdicts = {name: sum(cell[name] for cell in counted) for name in VERDICTS}
    lines = [
        f"Prompts counted of each task: {prompts}. Lossless: of {sum(verdicts.values()):,} "
        f"answers compared with plain decoding as `specstream verify` does, {verdicts['identical']:,} "
        f"were identical, {verdicts['near-tie']} parted at a near-tie and {verdicts['mismatch']} differed."
    ]
    if told := {
        name: of
        for name, of in known.get("training", {}).items()
        if of and not name.startswith("streams +")
    }:
        parts = [
            f"{name} {of['positions']:,} positions, {of['updates']} updates, {of['minutes']:g} minutes"
            + (f" at {of['learning_rate']:g}" if "learning_rate" in of else "")
            for name, of in told.items()
        ]
        lines.append(f"Trained, on cores that others used too: {'; '.join(parts)}.")
    if cost := known.get("cost"):
        lines.append(
            f"Steps timed in turns on {cost['prompts']} prompts: {cost['machine']}; "
            f"{cost['versions']}; {cost['date']}."
        )
    return lines


def _overall(known: dict[str, Any]) -> list[str]:
    """Return the table over all tasks."""
    heads = [
        f"{what}, {NAMES.get(tree, tree)}" for what in ("tokens", "cost", "gives") for tree in TREES
    ]
    lines = [_row(["drafter", "parameters", *heads]), f"|{'---|' * (2 + len(heads))}"]
    costs = known.get("cost", {}).get("steps", {})
    for name, trees in known["cells"].items():
        rates = [tokens_per_pass(trees.get(tree, {})) for tree in TREES]
        prices = [costs.get(name, {}).get(tree) for tree in TREES]
        gains = [r / p if r and p else None for r, p in zip(rates, prices, strict=True)]
        size = known.get("parameters", {}).get(name, 0)
        figures = [_number(value) for value in (*rates, *prices, *gains)]
        lines.append(_row([name, f"{size / 1e6:.2f} M" if size else "0", *figures]))
    return lines


def _by_task(cells: dict[str, Any]) -> list[str]:
    """Return the table of tokens per pass by task."""
    tasks = list(
        dict.fromkeys(t for trees in cells.values() for found in trees.values() for t in found)
    )
    lines = [_row(["drafter", *tasks]), f"|{'---|' * (1 + len(tasks))}"]
    for name, trees in cells.items():
        rates = [
            " / ".join(_number(tokens_per_pass(trees.get(tree, {}), task)) for tree in TREES)
            for task in tasks
        ]
        lines.append(_row([name, *rates]))
    return lines


def _beaten(cells: dict[str, Any]) -> list[str]:
    """Say, for each rival (the paper's streams among them), where it gives more tokens a pass than our streams do."""
    if OURS not in cells:
        return []
    lines = []
    for name, trees in cells.items():
        if name == OURS or name.startswith("streams +"):
            continue
        ahead = []
        for tree in TREES:
            own, theirs = cells[OURS].get(tree, {}), trees.get(tree, {})
            for task in (None, *theirs):
                ours, rival = tokens_per_pass(own, task), tokens_per_pass(theirs, task)
                if ours and rival and round(rival, 2) > round(ours, 2):
                    where = "over all tasks" if task is None else task
                    rows = "as a chain" if tree in NAMES else f"with {tree} rows"
                    ahead.append(f"{where} {rows} ({rival:.2f} to {ours:.2f})")
        if ahead:
            lines.append(f"* {name} gives more tokens a pass than {OURS}: {'; '.join(ahead)}.")
        else:
            lines.append(f"* {name} gives nowhere more tokens a pass than {OURS}.")
    return lines


def _clock(known: dict[str, Any]) -> list[str]:
    """Return the table of wall-clock."""
    clock = known.get("clock")
    if not clock:
        return []
    differing = clock["differing"]
    lines = [
        "",
        f"Wall-clock of the five best, each with its best tree, in turns with mlx-lm on "
        f"{clock['prompts']} prompts ({clock['machine']}; {clock['versions']}; {clock['date']}"
        f"{'; all answers the same' if not differing else f'; {differing} answers differ'}):",
        "",
        _row(["drafter", "tree", "times as fast as mlx-lm"]),
        "|---|---|---|",
    ]
    ranked = sorted(clock["methods"].items(), key=lambda item: -item[1]["speedup"])
    for name, found in ranked:
        lines.append(
            _row([name, NAMES.get(found["tree"], found["tree"]), f"{found['speedup']:.2f}"])
        )
    return lines
