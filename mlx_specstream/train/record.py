"""The log of a run, in JSON lines; `curve.py` draws it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO

LOG_FILE = "train_log.jsonl"


class Log:
    """Appends records to the log; on resuming, what came after the saved state is cut off."""

    def __init__(self, folder: Path, keep_bytes: int, write: bool) -> None:
        self.file: IO[bytes] | None = None
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / LOG_FILE).open("ab")
            self.file.truncate(keep_bytes)
            self.file.seek(0, 2)

    def write(self, record: Mapping[str, object]) -> None:
        if self.file is not None:
            self.file.write((json.dumps(record) + "\n").encode())
            self.file.flush()

    @property
    def num_bytes(self) -> int:
        return self.file.tell() if self.file is not None else 0

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
