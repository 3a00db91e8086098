"""Tool calls in a text that arrives in pieces, parsed as mlx-lm parses them for the model.

    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>

What stands between the model's marks is a call; everything else is the answer's text. A call
that cannot be parsed stays text: nothing a model wrote is dropped.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...generation.stop import StopStrings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("mlx_specstream")


@dataclass(frozen=True)
class Call:
    """A function to call; `arguments` is JSON."""

    name: str
    arguments: str
    id: str


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls; `end` may be empty, then a call goes on to the answer's end."""

    start: str
    end: str
    parse: Callable[[str, Any], Any]

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper) -> ToolFormat | None:
        """Return what mlx-lm found in the tokenizer's files, None for a model without tools."""
        if not tokenizer.has_tool_calling:
            return None
        return cls(tokenizer.tool_call_start, tokenizer.tool_call_end, tokenizer.tool_parser)


class CallReader:
    """Splits one answer's text into text and calls."""

    def __init__(self, form: ToolFormat, tools: Sequence[dict[str, Any]]) -> None:
        self.form = form
        self.tools = list(tools)
        self.found = 0
        self._mark = StopStrings([form.start])
        self._inside: str | None = None

    def feed(self, text: str, *, over: bool = False) -> tuple[str, list[Call]]:
        """Return the text and the calls that are complete now; `over`: nothing will follow."""
        plain, calls = "", []
        while True:
            if self._inside is None:
                before, text = self._until_start(text)
                plain += before
                if self._inside is None:
                    break
            self._inside += text
            end = self._inside.find(self.form.end) if self.form.end else -1
            if end < 0:
                break
            inner, text = self._inside[:end], self._inside[end + len(self.form.end) :]
            self._inside = None
            left, parsed = self._parsed(inner, self.form.end)
            plain += left
            calls += parsed
        if over:
            plain += self._mark.flush()
            if self._inside is not None:
                left, parsed = self._parsed(self._inside, "")
                plain += left
                calls += parsed
                self._inside = None
        return plain, calls

    def _until_start(self, text: str) -> tuple[str, str]:
        """Return the text before the next mark and, if there is one, what is behind it."""
        whole = self._mark.held + text
        before, marked = self._mark.feed(text)
        if not marked:
            return before, ""
        self._inside = ""
        return before, whole[len(before) + len(self.form.start) :]

    def _parsed(self, inner: str, end: str) -> tuple[str, list[Call]]:
        """Return ("", calls), or the text as it was written if it is none."""
        try:
            # Parsers raise whatever they like: the text is the model's.
            found = self.form.parse(inner, self.tools)
            calls = [_call(one) for one in (found if isinstance(found, list) else [found])]
        except Exception as error:
            log.info("what looks like a tool call is none (%s)", type(error).__name__)
            return f"{self.form.start}{inner}{end}", []
        self.found += len(calls)
        return "", calls


def _call(found: Any) -> Call:
    name, arguments = found["name"], found.get("arguments") or {}
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    given = found.get("id")
    return Call(
        name, arguments, given if isinstance(given, str) else f"call_{secrets.token_hex(12)}"
    )
