"""Tool calls in a text that arrives in pieces, parsed as mlx-lm parses them for the model.

    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>

What stands between the model's marks is a call; everything else is the answer's text. What cannot
be read as a call of a named function with a JSON object stays text: nothing a model wrote is
dropped but blanks next to calls, and every call that is sent out is accepted when a client sends it
back.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...generation.stop import StopStrings
from .limits import MAX_TOOLS
from .timed import TimedProcess

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("mlx_specstream")

# What models call a function's name and its arguments; the first that is there counts.
_NAMES = ("name", "function", "tool", "tool_name", "function_name")
_NAME = re.compile(r"[^\s\"'<>{}]+")  # of a function that was not offered
_ID = string.ascii_letters + string.digits
_PARSERS = "mlx_lm.tool_parsers."
_SHORT = 1000  # characters that every parser reads at once
LIMIT_S = 3.0  # for longer ones
_ARGUMENTS = ("arguments", "parameters", "args", "params", "input", "kwargs")


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

    def within_time(self, process: TimedProcess) -> ToolFormat:
        """Return the format whose long calls are parsed by `process`, within a time limit."""
        parser = self.parse.__module__
        if not parser.startswith(_PARSERS):
            return self

        def parse(text: str, tools: Any) -> Any:
            if len(text) <= _SHORT:
                return self.parse(text, tools)
            return process.ask({"parser": parser, "text": text, "tools": tools}, LIMIT_S)

        return replace(self, parse=parse)


class CallReader:
    """Splits one answer's text into text and calls."""

    def __init__(self, form: ToolFormat, tools: Sequence[dict[str, Any]]) -> None:
        self.form = form
        self.tools = list(tools)
        self.found = 0
        self._ids: set[str] = set()
        self._mark = StopStrings([form.start])
        self._inside: str | None = None
        self._searched = 0  # characters of it in which the end mark does not begin
        # Blanks at the beginning or behind a call: if a call comes next, they are no text.
        self._blank: str | None = ""

    @property
    def is_slow(self) -> bool:
        """Tell whether reading on may take a while: not on an event loop."""
        return self._inside is not None and len(self._inside) > _SHORT // 2

    def feed(self, text: str, *, over: bool = False) -> tuple[str, list[Call]]:
        """Return the text and the calls that are complete now; `over`: nothing will follow."""
        plain, calls = "", []
        while True:
            if self._inside is None:
                before, behind = self._mark.cut(text)
                plain += self._text(before)
                if behind is None:
                    break
                self._inside, self._searched, text = "", 0, behind
            self._inside += text
            end = self._inside.find(self.form.end, self._searched) if self.form.end else -1
            if end < 0:
                self._searched = max(0, len(self._inside) - len(self.form.end))
                break
            inner, text = self._inside[:end], self._inside[end + len(self.form.end) :]
            self._inside = None
            left, parsed = self._parsed(inner, self.form.end)
            plain += self._text(left)
            calls += parsed
        if over:
            plain += self._text(self._mark.flush())
            if self._inside is not None:
                left, parsed = self._parsed(self._inside, "")
                plain += self._text(left)
                calls += parsed
                self._inside = None
            if self._blank and not self.found:
                plain += self._blank
        return plain, calls

    def _text(self, text: str) -> str:
        """Return what is text for certain."""
        if self._blank is None:
            return text
        self._blank += text
        if not self._blank.strip():
            return ""
        text, self._blank = self._blank, None
        return text

    def _parsed(self, inner: str, end: str) -> tuple[str, list[Call]]:
        """Return ("", calls), or the text as it was written if it is none."""
        try:
            # Parsers raise whatever they like: the text is the model's.
            found = self.form.parse(inner, self.tools)
            calls = [
                _call(one, self.tools) for one in (found if isinstance(found, list) else [found])
            ]
            if not calls or self.found + len(calls) > MAX_TOOLS:
                raise ValueError(f"{len(calls)} calls after {self.found}")
        except Exception as error:
            log.info("what looks like a tool call is none (%s)", type(error).__name__)
            return f"{self.form.start}{inner}{end}", []
        self.found += len(calls)
        self._blank = ""
        for place, call in enumerate(calls):
            if call.id in self._ids:
                calls[place] = replace(call, id=_new_id())
            self._ids.add(calls[place].id)
        return "", calls


def _call(found: Any, tools: Sequence[dict[str, Any]]) -> Call:
    """Return what a parser found as a call that clients can run and send back.

    Raises:
        ValueError: there is no name, the arguments are no JSON object, or hold what is no text.
    """
    for key in ("function", "tool"):  # OpenAI's own nesting, which some models write
        if isinstance(found.get(key), dict):
            found = {**found, **found[key]}
            del found[key]
    name = next((found[key] for key in _NAMES if key in found), None)
    if not isinstance(name, str):
        raise ValueError("a call without a name")
    name = name.strip()
    offered = [tool["function"] for tool in tools]
    function: dict[str, Any] = next((one for one in offered if one["name"] == name), {})
    if not function and not _NAME.fullmatch(name):
        raise ValueError("a text in the place of a name")
    arguments, described = _arguments(found), function.get("parameters") or {}
    if set(arguments) == {"raw"} and "raw" not in (described.get("properties") or {}):
        raise ValueError(
            "text that the parser could not read"
        )  # which mlx-lm's GLM parser calls so
    if arguments and arguments == described:
        raise ValueError("a tool's description instead of a call")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    given = found.get("id")
    call = Call(name, text, given if isinstance(given, str) and given else _new_id())
    # Half a surrogate pair is no text: it can neither be sent nor come back.
    f"{call.name}{call.arguments}{call.id}".encode()
    return call


def _arguments(found: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments under whichever name they stand; without any they are empty."""
    given = [key for key in _ARGUMENTS if key in found]
    if not given:
        if others := set(found) - {*_NAMES, "id", "type", "index"}:
            raise ValueError(f"a call with {sorted(map(str, others))[:3]} and no arguments")
        return {}
    arguments = found[given[0]]
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("arguments that are no JSON object")
    return arguments


def _new_id() -> str:
    """Return nine letters and digits: Mistral's chat templates refuse any other id."""
    return "".join(secrets.choice(_ID) for _ in range(9))
