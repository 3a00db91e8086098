"""Prompts from mlx-lm's data formats, one JSON object a line, or from plain text.

{"messages": [{"role": "user", "content": "..."}, ...]}     chat: turns up to the last user's
{"prompt": "...", "completion": "..."}                      completions: the prompt
{"text": "..."}                                             text: continued as it is
{"turns": ["...", "..."]}                                   Spec-Bench: the first turn
any other line                                              a user's message
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

BUILT_IN = Path(__file__).parent / "chat.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer, or a bare text to continue (`messages` empty)."""

    messages: tuple[Mapping[str, str], ...] = ()
    text: str = ""

    @classmethod
    def user(cls, text: str, system: str | None = None) -> Prompt:
        """Return a user's message, after a system prompt if there is one."""
        turns = [{"role": "system", "content": system}] if system is not None else []
        return cls((*turns, {"role": "user", "content": text}))

    @property
    def title(self) -> str:
        """Return what was asked, on one line."""
        return " ".join((self.messages[-1]["content"] if self.messages else self.text).split())


def built_in_prompts() -> list[Prompt]:
    """Return the dozen prompts that come with the package."""
    return read_prompts(BUILT_IN)


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read the first `limit` prompts of a file; a `.json`/`.jsonl` file must hold JSON lines.

    Raises:
        DataError: the file cannot be read, holds no prompt, or a line is of no known format.
    """
    return [prompt_of(record, where) for record, where in read_records(path, limit)]


def read_records(path: str | Path, limit: int | None = None) -> list[tuple[object, str]]:
    """Read the first `limit` lines of a file of prompts, each with where it stands.

    A JSON line is what it holds, another line its text.

    Raises:
        DataError: the file cannot be read, holds no line, or a line is not valid JSON.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, ValueError) else error.strerror
        raise DataError(
            f"the prompts in {path} cannot be read: {reason}; name a text file with a prompt per "
            "line, or a JSONL file as mlx-lm's training data."
        ) from None
    as_json = path.suffix in (".json", ".jsonl")
    records: list[tuple[object, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        records.append((_parsed(line, where) if as_json else line.strip(), where))
        if limit is not None and len(records) >= limit:
            break
    if not records:
        raise DataError(f"{path} holds no prompt; write one per line.")
    return records


def prompt_of(record: object, where: str) -> Prompt:
    """Return the prompt of one line, of several turns the first.

    Raises:
        DataError: the record is of no known format.
    """
    if isinstance(record, str):
        return Prompt.user(record)
    if isinstance(record, dict):
        messages = record.get("messages")
        if isinstance(messages, list) and (turns := _up_to_user(messages)):
            return Prompt(messages=turns)
        asked = record.get("turns")
        if (
            isinstance(asked, list)
            and asked
            and all(isinstance(t, str) and t.strip() for t in asked)
        ):
            return Prompt.user(asked[0])
        for key in ("prompt", "text"):
            value = record.get(key)
            if isinstance(value, str) and value.strip():
                return Prompt(text=value) if key == "text" else Prompt.user(value)
    raise DataError(
        f'{where} holds no prompt; expected {{"messages": [...]}} with a user\'s turn, '
        '{"prompt": "..."}, {"text": "..."} or Spec-Bench\'s {"turns": ["..."]}.'
    )


def _parsed(line: str, where: str) -> object:
    """Return what one JSON line holds; a bare string is no record."""
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is not valid JSON; write one object per line.") from None
    return [record] if isinstance(record, str) else record


def _up_to_user(messages: list[object]) -> tuple[Mapping[str, str], ...]:
    """Return the turns up to the last user's, which is what a model answers."""
    turns = [
        {"role": turn["role"], "content": turn["content"]}
        for turn in messages
        if isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
    ]
    if len(turns) != len(messages):
        return ()
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return tuple(turns) if turns and turns[-1]["content"].strip() else ()
