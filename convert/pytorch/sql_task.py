"""How good a model's SQL is: exact match, whether it runs at all, and whether it gives the right rows.

The schemas come without data, so queries run in SQLite over tables filled at random, several times: numbers and words
are drawn from small pools which hold the gold query's own constants, so that conditions hold for some rows and not for
others. Equal answers on every filling count as right; rows are compared in order only if the gold query orders them.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter
from dataclasses import dataclass

from ...errors import DataError

FILLINGS = 5
ROWS = 12
STEPS = 200_000
"""SQLite instructions after which a query counts as failed: a wrong join can run for ever."""

STRING = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")


@dataclass(frozen=True)
class Judgement:
    """What one answer reached."""

    exact: bool
    runs: bool
    right: bool


def normalized(query: str) -> str:
    """Return a query with one blank between words, strings in single quotes, all else in lower case."""
    parts, end = [], 0
    for found in STRING.finditer(query):
        parts += [query[end : found.start()].lower(), f"'{found[0][1:-1]}'"]
        end = found.end()
    text = "".join([*parts, query[end:].lower()])
    text = re.sub(r"\s+", " ", text).strip().rstrip(";").strip()
    return re.sub(r"\s*([(),=<>])\s*", r"\1", text)


def judge(schema: str, gold: str, answer: str, seed: int = 0) -> Judgement:
    """Compare an answer with the gold query; `schema`: CREATE TABLE statements."""
    ordered = "order by" in gold.lower()
    runs = right = True
    for filling in range(FILLINGS):
        database = filled(schema, gold, f"{seed}/{filling}")
        wanted, got = (result(database, query, ordered) for query in (gold, answer))
        database.close()
        runs = runs and got is not None
        right = right and got is not None and got == wanted
    return Judgement(normalized(answer) == normalized(gold), runs, right)


def filled(schema: str, gold: str, seed: str) -> sqlite3.Connection:
    """Return a database in memory: the schema's tables, `ROWS` random rows each."""
    draw = random.Random(seed)  # noqa: S311
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(schema)
    except sqlite3.Error as error:
        raise DataError(
            f"a prompt's schema is not SQL ({error}); it should begin with CREATE TABLE statements."
        ) from error
    words = [found[0][1:-1].replace("%", "") for found in STRING.finditer(gold)]
    words += ["red", "blue", "Paris", "Ann"]
    numbers = [float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", STRING.sub("", gold))]
    numbers = [n + step for n in numbers for step in (-1, 0, 1)] + [1.0, 2.0, 3.0]
    tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (table,) in tables:
        columns = database.execute(f'PRAGMA table_info("{table}")').fetchall()
        marks = ", ".join("?" * len(columns))
        for _ in range(ROWS):
            # Small numbers and few words, so that joins meet; a key drawn twice is simply left out.
            row = [
                draw.choice(words if kind.upper() in ("TEXT", "") else numbers)
                for _, _, kind, *_ in columns
            ]
            database.execute(f'INSERT OR IGNORE INTO "{table}" VALUES ({marks})', row)  # noqa: S608
    return database


def result(database: sqlite3.Connection, query: str, ordered: bool) -> object:
    """Return a query's rows, as they come or counted; None if it cannot be run."""
    left = [STEPS // 1000]

    def tick() -> int:
        left[0] -= 1
        return int(left[0] < 0)

    database.set_progress_handler(tick, 1000)
    try:
        rows = database.execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None
    return rows if ordered else Counter(rows)
