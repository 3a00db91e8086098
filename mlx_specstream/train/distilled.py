"""Self-distillation's data: prompts to answer, and a file of answers that a stopped run continues.

{"messages": [..., {"role": "assistant", "content": "..."}], "prompt_ids": [...],
"answer_ids": [...], "index": 17}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import OutputError
from .data import Key


@dataclass
class PromptToAnswer:
    """A prompt: its place in its file, its messages, its tokens. source: the file, where it is told."""

    index: int
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    tokens: list[int] = field(default_factory=list)
    source: str = ""

    def record(self, answer: list[int], tokenizer: Any) -> dict[str, Any]:
        """Return the line to write for an answer."""
        text = tokenizer.decode(answer, skip_special_tokens=True)
        return {
            **({"source": self.source} if self.source else {}),
            "messages": [*self.messages, {"role": "assistant", "content": text}],
            **({"tools": self.tools} if self.tools else {}),
            "prompt_ids": self.tokens,
            "answer_ids": answer,
            "index": self.index,
        }


P = TypeVar("P", bound=PromptToAnswer)


def answered(path: Path) -> set[Key]:
    """Return source and index of the answers in a file, cutting off a last line that is incomplete.

    Raises:
        OutputError: the file is something else.
    """
    if not path.exists():
        return set()
    done, whole = set(), 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                done.add((str(record.get("source", "")), int(record["index"])))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise OutputError(
                    f"{path} exists and was not written by specstream distill; name another file."
                ) from None
            whole += len(line)
    os.truncate(path, whole)
    return done


def in_order(prompts: Sequence[P], window: int) -> Iterator[P]:
    """Yield prompts with neighbours of like length, sorted inside windows: any beginning is a fair sample."""
    for start in range(0, len(prompts), window):
        yield from sorted(prompts[start : start + window], key=lambda prompt: len(prompt.tokens))
