"""Prompts from mlx-lm's data formats, one JSON object a line, or from plain text.

{"messages": [{"role": "user", "content": "..."}, ...]}     chat: turns up to the last user's,
                                                            with "tools" if the record has them
{"prompt": "...", "completion": "..."}                      completions: the prompt
{"text": "..."}                                             text: continued as it is
{"turns": ["...", "..."]}                                   Spec-Bench: the first turn
any other line                                              a user's message
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, shown
from .lines import json_lines, text_lines

BUILT_IN = Path(__file__).parent / "chat.jsonl"
DEMO = Path(__file__).parent / "demo.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer, or a bare text to continue (`messages` empty).

    tools: definitions for the chat template, as the record has them.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    tools: tuple[Any, ...] = ()

    @classmethod
    def user(cls, text: str, system: str | None = None) -> Prompt:
        """Return a user's message, after a system prompt if there is one."""
        turns = [{"role": "system", "content": system}] if system is not None else []
        return cls((*turns, {"role": "user", "content": text}))

    @property
    def bare(self) -> str:
        """Return the text without a chat template: the turns' own words, a blank line between."""
        said = (turn.get("content") for turn in self.messages)
        return "\n\n".join(text for text in said if text) or self.text

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
    as_json = path.suffix in (".json", ".jsonl")
    records: list[tuple[object, str]] = []
    for record, where in json_lines(path) if as_json else text_lines(path):
        # A bare JSON string is no record: of a prompt file's lines only text stands for itself.
        records.append(([record] if as_json and isinstance(record, str) else record, where))
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
        if isinstance(messages, list) and (turns := _up_to_user(turns_of(messages, where))):
            tools = record.get("tools")
            return Prompt(messages=turns, tools=tuple(tools) if isinstance(tools, list) else ())
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


def _up_to_user(turns: list[dict[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Return the turns up to the last user's, which is what a model answers."""
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return tuple(turns) if turns and turns[-1]["content"].strip() else ()


def turns_of(messages: Sequence[object], where: str) -> list[dict[str, Any]]:
    """Return a record's messages as chat templates read them, their content one text.

    OpenAI's clients write content as a list of parts, too, and leave it out beside calls of tools
    or of an empty result; of templates that read it, none knows that.

    Raises:
        DataError: a message without a role, or that says nothing, or not in text; `where` is named.
    """
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: every message must be an object with a role.")
        turns.append({**message, "content": _content(message, where)})
    return turns


def _content(message: Mapping[str, Any], where: str) -> str:
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, str):
        return content
    may_be_silent = (isinstance(calls, list) and calls) or message["role"] == "tool"
    if content is None and may_be_silent:
        return ""
    if isinstance(content, list) and content:
        parts: list[Any] = [
            part.get("text") if isinstance(part, dict) else part for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
        kind = next(part for part in content if not isinstance(part, dict) or "text" not in part)
        named = kind.get("type") if isinstance(kind, dict) else kind
        raise DataError(f"{where}: a message has a part of type {shown(named)}; only text is read.")
    raise DataError(
        f"{where}: every message must have its content as a string, or tool_calls; the one of role "
        f"{shown(message['role'])} has {shown(content)}."
    )
