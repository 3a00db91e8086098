"""The items of a conversation as the Responses API has them, as the messages of a chat.

items       message(user)  reasoning  message(assistant)  function_call  function_call_output
messages    user           assistant ......................................  tool
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from ..messages_schema import Strict
from ..parts import output_of, text_of, type_of, unreadable
from ..schema import parsed

Json = dict[str, Any]
_READABLE = frozenset({"text", "input_text", "output_text", "refusal"})


class MessageItem(Strict):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None


class CallItem(Strict):
    """A call of an earlier answer, which chats take as it is, whatever the model wrote."""

    call_id: Any
    name: Any = None
    arguments: Any = "{}"


class OutputItem(Strict):
    """What a call gave."""

    call_id: Any
    output: Any = None


class ReasoningItem(Strict):
    """A thought of an earlier answer."""

    summary: Any = None
    content: Any = None


_KINDS: dict[str, type[BaseModel]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
    "reasoning": ReasoningItem,
}


def kind_of(item: Json, at: tuple[str | int, ...]) -> str:
    """Return an item's type; messages and references need not say it."""
    kind = type_of(item, at)
    if not kind:
        return "message" if "role" in item else "item_reference" if "id" in item else ""
    return kind


def conversation(earlier: Sequence[Json], items: Sequence[Json]) -> list[Json]:
    """Return the messages of a conversation: items known from earlier requests, and new ones.

    Raises:
        ApiError: a new item cannot be read.
    """
    messages: list[Json] = []
    for number, item in enumerate([*earlier, *items]):
        _append(messages, item, ("input", max(0, number - len(earlier))))
    return messages


def _append(messages: list[Json], item: Json, at: tuple[str | int, ...]) -> None:
    kind = kind_of(item, at)
    if kind not in _KINDS:
        raise unreadable(kind, at)
    read = parsed(_KINDS[kind], item, at)
    if isinstance(read, OutputItem):
        content = output_of(read.output, (*at, "output"), _READABLE)
        messages.append({"role": "tool", "tool_call_id": read.call_id, "content": content})
    elif isinstance(read, CallItem):
        function = {"name": read.name, "arguments": read.arguments}
        call = {"id": read.call_id, "type": "function", "function": function}
        _assistant(messages).setdefault("tool_calls", []).append(call)
    elif isinstance(read, ReasoningItem):
        turn = _assistant(messages)
        thought = text_of(read.content, (*at, "content"), {"reasoning_text"})
        thought = thought or text_of(read.summary, (*at, "summary"), {"summary_text"})
        turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
    elif isinstance(read, MessageItem):
        content = text_of(read.content, (*at, "content"), _READABLE)
        if read.role == "assistant":
            _assistant(messages)["content"] += content
        else:
            messages.append({"role": read.role, "content": content})


def _assistant(messages: list[Json]) -> Json:
    """Return the turn that the items of one answer share."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]
