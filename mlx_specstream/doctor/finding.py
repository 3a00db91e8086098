"""One thing that is known of a combination of chip, system and versions."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["problem", "advice", "fact"]


@dataclass(frozen=True)
class Finding:
    """One thing to know: what is so, why it matters, what to do, and where it was reported."""

    level: Level
    what: str
    why: str
    do: str
    source: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the JSON form."""
        return asdict(self)


def problem(what: str, why: str, do: str, source: str = "") -> Finding:
    """Return the finding of something that will not work, or hardly."""
    return Finding("problem", what, why, do, source)


def advice(what: str, why: str, do: str, source: str = "") -> Finding:
    """Return the finding of something that can be had better."""
    return Finding("advice", what, why, do, source)


def fact(what: str, why: str, do: str, source: str = "") -> Finding:
    """Return the finding of something that is so, and worth knowing."""
    return Finding("fact", what, why, do, source)


def version(text: str) -> tuple[int, ...]:
    """Return the numbers a version begins with: `0.32.1.dev2` is (0, 32, 1); () if it has none."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def older(found: str, wanted: str) -> bool:
    """Tell whether a version is known and older than another."""
    return bool(version(found)) and version(found) < version(wanted)
