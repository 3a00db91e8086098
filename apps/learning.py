"""Answers that are kept to train streams on, if the user asked for it (`--learn`).

CACHE/learned/NAME-PLACE.jsonl, readable by its owner alone; a line an answer:

    {"prompt": "...", "completion": "...", "prompt_ids": [...], "answer_ids": [...]}

Nothing leaves this machine, and nobody but `specstream adopt --continue` reads it. `specstream adopt
--forget` deletes it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..loading.model_cache import cache_folder
from ..weights.adopted import adopted_folder, place_of

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("mlx_specstream")

LEARN_HELP = (
    "keep prompts and answers on this machine, to train streams on (specstream adopt --continue)"
)
LEAST_TOKENS = 8  # of an answer; shorter ones teach streams nothing
LONGEST_PROMPT = 4096  # tokens
MOST_BYTES = 64_000_000  # of the file; afterwards nothing more is kept


def learned_folder() -> Path:
    """Return the folder of all kept answers; it need not exist."""
    return cache_folder() / "learned"


def learned_file(name: str, model_folder: Path, adapter_path: str | None = None) -> Path:
    """Return the file of one model's kept answers; it need not exist."""
    kept = adopted_folder(Path(name).name, place_of(model_folder, adapter_path))
    return learned_folder() / f"{kept.name}.jsonl"


def notice(path: Path) -> str:
    """Return what a user who asked for it is told."""
    return (
        f"--learn: prompts and answers are kept in {path}, on this machine only; specstream adopt "
        "--continue trains on them, specstream adopt --forget deletes them"
    )


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of kept answers; what a kill left unfinished is passed over."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("answer_ids") and line.endswith(b"\n"):
                yield line


class Learner:
    """Keeps answers in a file. A file that cannot be written ends the keeping, never a conversation."""

    def __init__(self, path: Path, tokenizer: TokenizerWrapper) -> None:
        self.path, self.tokenizer = path, tokenizer
        self.ended = False
        self._lock = threading.Lock()

    def keep(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Append one answer, unless it is too short, its prompt too long, or the file full."""
        if self.ended or len(answer) < LEAST_TOKENS or len(prompt) > LONGEST_PROMPT:
            return
        record = {
            "prompt": self.tokenizer.decode(list(prompt)),
            "completion": self.tokenizer.decode(list(answer), skip_special_tokens=True),
            "prompt_ids": list(prompt),
            "answer_ids": list(answer),
        }
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            with self._lock:
                self._append(line)
        except OSError as error:
            self.ended = True
            log.warning("note: answers are no longer kept in %s (%s).", self.path, error.strerror)

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        descriptor = os.open(self.path, flags, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size + len(line) > MOST_BYTES:
                self.ended = True
                log.warning("note: %s is full, so answers are no longer kept.", self.path)
                return
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # after a kill
                line = b"\n" + line
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
