"""What a benchmark answers: prompts with categories, from files or from the built-in set.

{"question_id": 1, "category": "writing", "turns": ["...", "..."]}      Spec-Bench, MT-bench
{"category": "sql", "prompt": "..."}                                    any of mlx-lm's formats
a .txt file                                                             a prompt per line

A line without a category has its file's: the name, or the folder's for train, valid and test.
Later turns are asked after the reference's answers to the earlier ones, for every method alike.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, OptionError
from ..prompts import Prompt, prompt_of, read_records

BUILT_IN = "built-in"
_BUILT_IN_FILE = Path(__file__).parent / "prompts.jsonl"
_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Case:
    """A prompt of a category; `more_turns` are the user's next messages, if there are any."""

    category: str
    prompt: Prompt
    more_turns: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Return the hash of all that is asked."""
        turns = [[turn["role"], turn.get("content")] for turn in self.prompt.messages]
        text = json.dumps([turns, self.prompt.text, self.more_turns], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def read_cases(source: str) -> list[Case]:
    """Read a source of prompts: `built-in`, a file, or `CATEGORY=FILE`.

    Raises:
        DataError: the file cannot be read or a line is of no known format.
    """
    category, path = "", Path(source).expanduser()
    if source == BUILT_IN:
        path = _BUILT_IN_FILE
    elif "=" in source and not path.exists():
        category, _, name = source.partition("=")
        path = Path(name).expanduser()
    by_default = path.parent.name if path.stem in _SPLITS and path.parent.name else path.stem
    cases = []
    for record, where in read_records(path):
        own = record.get("category") if isinstance(record, dict) else None
        prompt = prompt_of(record, where)
        turns = record.get("turns") if isinstance(record, dict) else None
        more = tuple(turns[1:]) if isinstance(turns, list) else ()
        named = own if isinstance(own, str) and own.strip() else by_default
        cases.append(Case(category.strip() or named.strip(), prompt, more))
    return cases


def chosen_cases(
    sources: Sequence[str],
    categories: Sequence[str] = (),
    num_prompts: int | None = None,
    seed: int = 0,
    *,
    in_turns: bool = False,
) -> list[Case]:
    """Read all sources; keep `categories` and, of each, `num_prompts` drawn by `seed`.

    Categories follow each other, or take turns, so that a run that is cut short has measured all.

    Raises:
        DataError: as `read_cases`. OptionError: a category that no prompt has.
    """
    cases = [case for source in sources for case in read_cases(source)]
    if not cases:
        raise DataError("there is no prompt to measure; name a file with --prompts.")
    known = names(cases)
    if unknown := [name for name in categories if name not in known]:
        raise OptionError(
            f"no prompt has the category {unknown[0]!r}; there are {', '.join(known)}."
        )
    groups = []
    for name in categories or known:
        group = [case for case in cases if case.category == name]
        if num_prompts is not None and num_prompts < len(group):
            # Not for secrets: the same seed must draw the same prompts.
            drawn = random.Random(f"{seed} {name}").sample(range(len(group)), num_prompts)  # noqa: S311
            group = [group[index] for index in sorted(drawn)]
        groups.append(group)
    if not in_turns:
        return [case for group in groups for case in group]
    return [
        group[place]
        for place in range(max(map(len, groups)))
        for group in groups
        if place < len(group)
    ]


def names(cases: Iterable[Case]) -> list[str]:
    """Return the categories in the order of their first prompts."""
    return list(dict.fromkeys(case.category for case in cases))
