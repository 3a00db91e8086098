"""Conversations as JSON files: read with suspicion, written whole, private to their owner.

{"format": "mlx-specstream conversation", "version": 1, "model": "demo", "system": null,
 "exchanges": [{"question": "Hi", "answer": "Hello!", "stopped": false}], "forgotten": 0}

Settings are not part of it: a conversation may go on with another model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import DataError
from ..machine import ranks
from ..weights.files import IfExists, atomic_file
from .conversation import Conversation, Exchange

FORMAT = "mlx-specstream conversation"
VERSION = 1
MAX_BYTES = 64_000_000


def save_conversation(
    conversation: Conversation, path: Path, model: str, *, if_exists: IfExists
) -> None:
    """Write a conversation; the file appears whole or not at all, readable by its owner alone.

    Raises:
        OutputError: it exists already (`if_exists="error"`) or cannot be written.
    """
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "system": conversation.system,
        "exchanges": [
            {
                "question": e.question,
                "answer": e.answer,
                "stopped": e.stopped,
                **({} if e.thought is None else {"thought": e.thought}),
            }
            for e in conversation.exchanges
        ],
        "forgotten": conversation.forgotten,
    }
    if ranks.is_follower():  # the leader writes
        return
    text = json.dumps(fields, ensure_ascii=False, indent=1) + "\n"
    with atomic_file(path, if_exists=if_exists) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)


def load_conversation(path: Path) -> Conversation:
    """Read a conversation that `save_conversation` wrote.

    Raises:
        DataError: the file cannot be read or holds something else.
    """
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise _refused(path, f"it is larger than {MAX_BYTES // 1_000_000} MB")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refused(path, error.strerror or "it cannot be opened") from None
    except (ValueError, RecursionError):
        raise _refused(path, "it is not JSON text") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _refused(path, "it is not a conversation")
    if fields.get("version") != VERSION:
        raise _refused(
            path, f"its version is {fields.get('version')!r}, and this program reads {VERSION}"
        )
    try:
        return _conversation(fields)
    except ValueError as error:
        raise _refused(path, str(error)) from None


def _conversation(fields: dict[str, object]) -> Conversation:
    """Return the conversation in `fields`; ValueError says what does not fit."""
    system, entries = fields.get("system"), fields.get("exchanges")
    forgotten = fields.get("forgotten", 0)
    if system is not None and not isinstance(system, str):
        raise ValueError("its system prompt is no text")
    if not isinstance(entries, list):
        raise ValueError("it has no list of exchanges")
    exchanges = [_exchange(entry, number) for number, entry in enumerate(entries, start=1)]
    if type(forgotten) is not int or not 0 <= forgotten <= max(0, len(exchanges) - 1):
        raise ValueError(f"it cannot have forgotten {forgotten!r} exchanges")
    return Conversation(system, exchanges, forgotten)


def _exchange(entry: object, number: int) -> Exchange:
    if not isinstance(entry, dict):
        raise ValueError(f"its exchange {number} is no object")
    question, answer = entry.get("question"), entry.get("answer")
    stopped, thought = entry.get("stopped", False), entry.get("thought")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"its exchange {number} has no question")
    if not isinstance(answer, str) or not isinstance(stopped, bool):
        raise ValueError(f"its exchange {number} has no answer")
    if thought is not None and not isinstance(thought, str):
        raise ValueError(f"its exchange {number} has a thought that is no text")
    return Exchange(question, answer, stopped, thought)


def _refused(path: Path, reason: str) -> DataError:
    return DataError(
        f"the conversation {path} cannot be read: {reason}; name a file written by /save."
    )
