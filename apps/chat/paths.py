"""Where a chat keeps conversations and line history: folders and files of their owner alone.

STATE (machine/folders.py)/chat-history         what was typed
STATE/conversations/20260131-174502.json

Nothing here is ever removed by the program.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from ...errors import DataError, OutputError
from ...machine.folders import state_folder


def history_file() -> Path:
    """Return the file of typed lines, made private before the first one is written.

    Raises:
        OutputError: it cannot be made.
    """
    path = _private(state_folder()) / "chat-history"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def new_conversation_file() -> Path:
    """Return the path that a conversation which starts now is saved to; it does not exist yet.

    Raises:
        OutputError: its folder cannot be made.
    """
    folder = _private(state_folder() / "conversations")
    stem = datetime.now().strftime("%Y%m%d-%H%M%S")
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def newest_conversation() -> Path:
    """Return the file of the conversation that was changed last.

    Raises:
        DataError: there is none.
    """
    folder = state_folder() / "conversations"
    found = [path for path in folder.glob("[!.]*.json") if path.is_file()]
    if not found:
        raise DataError("there is no earlier conversation to resume; start without --resume.")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _private(folder: Path) -> Path:
    """Make a folder that others cannot look into, and return it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written ({error.strerror}); set SPECSTREAM_STATE to a folder that can, "
        "or add --no-save."
    )
