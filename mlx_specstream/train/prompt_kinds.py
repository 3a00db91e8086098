"""Several thousand prompts of ten kinds, from templates: what a model is asked when it is adopted.

`prompts/kinds.jsonl` holds a kind a line: templates with slots, and what may stand in each slot,
words that may hold slots themselves, or a range of whole numbers. Everything in it was written for
this project. The kinds take turns, so any beginning of the list is a fair mixture.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from ..prompts.lines import json_lines
from .data import Record

KINDS = Path(__file__).parents[1] / "prompts" / "kinds.jsonl"
PER_KIND = 450
_SLOT = re.compile(r"\{(\w+)\}")
_RANGE = re.compile(r"(\d+)-(\d+)")
_TRIES = 50

Slots = Mapping[str, Sequence[str] | str]


def kind_records() -> list[Record]:
    """Return the prompts, always the same, the kinds in turn."""
    kinds = {}
    for fields, _ in json_lines(KINDS):
        assert isinstance(fields, dict)
        drawn = _drawn(fields["kind"], fields["templates"], fields["slots"])
        kinds[fields["kind"]] = list(islice(drawn, PER_KIND))
    return [
        Record({"prompt": texts[number]}, f"built-in {kind} prompt {number + 1}", kind, number)
        for number in range(PER_KIND)
        for kind, texts in kinds.items()
        if number < len(texts)
    ]


def _drawn(kind: str, templates: Sequence[str], slots: Slots) -> Iterator[str]:
    """Yield different prompts of one kind, the templates in turn, until no new one is found."""
    source = random.Random(kind)  # noqa: S311 (a choice of words)
    seen: set[str] = set()
    turn = misses = 0
    while misses < _TRIES:
        text = _filled(templates[turn % len(templates)], slots, source)
        turn += 1
        misses = misses + 1 if text in seen else 0
        if text not in seen:
            seen.add(text)
            yield text


def _filled(template: str, slots: Slots, source: random.Random) -> str:
    """Return a template with its slots filled; a slot that occurs twice gets the same words."""
    chosen: dict[str, str] = {}

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in chosen:
            words = slots[name]
            if isinstance(words, str):
                bounds = _RANGE.fullmatch(words)
                assert bounds is not None
                chosen[name] = str(source.randint(int(bounds[1]), int(bounds[2])))
            else:
                chosen[name] = _SLOT.sub(fill, source.choice(words))
        return chosen[name]

    return _SLOT.sub(fill, template)
