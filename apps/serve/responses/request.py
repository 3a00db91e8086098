"""A request to the Responses API as a chat request.

Its own fields are translated; what it shares with a chat (temperature, top_p, mlx-lm's further
words ...) passes through as it is and is checked there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import ApiError, invalid
from ..limits import MAX_LOGPROBS, MAX_MESSAGES, MAX_TOOLS
from ..messages_schema import Count, Strict, Text
from ..parts import type_of, unreadable
from ..schema import ChatRequest, parsed, parsed_chat
from .items import Json, conversation
from .store import ResponseStore


class TextFormat(Strict):
    """Any text, a JSON object, or JSON that a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(Strict):
    """What the answer's text must be."""

    format: TextFormat | None = None


class ReasoningOptions(Strict):
    """How much the model thinks, and whether clients read its thoughts as summaries."""

    effort: Text | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Sends thoughts, which are never shortened, as summaries."
    )


class FunctionTool(Strict):
    """A function the model may call; parameters are a JSON schema."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class ResponseRequest(Strict):
    """The body of POST /v1/responses; sampling options are those of a chat."""

    model: Text | None = None
    input: Text | Annotated[list[Any], Field(max_length=MAX_MESSAGES)] | None = None
    instructions: Text | None = None
    previous_response_id: Text | None = None
    store: bool | None = Field(
        None, description="True by default: the response can be continued by its id."
    )
    stream: bool | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[Text] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    user: Text | None = None


# Its fields that are not a chat's, or that mean something else there.
_OWN = set(ResponseRequest.model_fields) - {
    *("model", "stream", "temperature", "top_p", "parallel_tool_calls"),
}
_NO_CHAT = {"messages", "n", "stream_options", "logprobs", "response_format"}
_UNSUPPORTED = {
    "background": "ask without it and wait, or stream",
    "conversation": "send previous_response_id or the whole conversation as input",
    "prompt": "send instructions and input",
}
_LOGPROBS = "message.output_text.logprobs"
# What chats call a field, and what it is called here.
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


@dataclass(frozen=True)
class Asked:
    """A request: its fields, the chat it stands for, and the new items of its conversation."""

    fields: ResponseRequest
    chat: ChatRequest
    items: list[Json]


def parsed_response(values: Json, store: ResponseStore) -> Asked:
    """Return what a request asks for, with the earlier turns that it refers to.

    Raises:
        ApiError: it makes no sense, or what it refers to is gone.
    """
    for name, instead in _UNSUPPORTED.items():
        if values.get(name):
            raise invalid(f"{name} is not supported by this server; {instead}.", name)
    fields = parsed(ResponseRequest, values)
    if isinstance(fields.input, str):
        items: list[Json] = [{"type": "message", "role": "user", "content": fields.input}]
    else:
        items = [store.referred(item, place) for place, item in enumerate(fields.input or [])]
    earlier = store.conversation(fields.previous_response_id or None)
    messages = conversation(earlier, items)
    if not messages:
        raise invalid("input: there is nothing to answer; give a text or items.", "input")
    body = {name: value for name, value in values.items() if name not in _OWN | _NO_CHAT}
    body["messages"] = with_instructions(fields.instructions, messages)
    body |= _tools(fields)
    if fields.max_output_tokens is not None:
        body["max_completion_tokens"] = fields.max_output_tokens
    if fields.text and (wanted := _format(fields.text.format)):
        body["response_format"] = wanted
    if fields.reasoning and fields.reasoning.effort:
        body["reasoning_effort"] = fields.reasoning.effort
    if fields.top_logprobs or _LOGPROBS in (fields.include or ()):
        body |= {"logprobs": True, "top_logprobs": fields.top_logprobs or 0}
    try:
        return Asked(fields, parsed_chat(body), items)
    except ApiError as error:
        raise error.renamed(NAMES) from None


def with_instructions(instructions: str | None, messages: list[Json]) -> list[Json]:
    """Return messages that begin with one system message, as most chat templates want them."""
    texts, rest = [instructions] if instructions else [], list(messages)
    while rest and rest[0]["role"] in ("system", "developer"):
        texts.append(rest.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest] if texts else rest


def _format(wanted: TextFormat | None) -> Json | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "json_object"}
    if wanted.schema_ is None:
        raise invalid("text.format: json_schema needs a schema.", "text.format")
    return {"type": "json_schema", "json_schema": {"schema": wanted.schema_}}


def _tools(fields: ResponseRequest) -> Json:
    """Return a chat's tools and choice among them."""
    tools = []
    for place, tool in enumerate(fields.tools or ()):
        if (kind := type_of(tool, ("tools", place))) != "function":
            raise unreadable(kind, ("tools", place))
        function = parsed(FunctionTool, tool, ("tools", place))
        tools.append(function.model_dump(exclude_none=True, exclude={"type"}))
    choice: Any = fields.tool_choice
    return {
        "tools": [{"type": "function", "function": tool} for tool in tools] or None,
        "tool_choice": _chosen(choice) if isinstance(choice, dict) else choice,
    }


def _chosen(choice: Mapping[str, Any]) -> Json:
    """Return a chat's choice, which nests its parts."""
    if choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    allowed, mode = choice.get("tools"), choice.get("mode", "auto")
    chosen = choice.get("type") == "allowed_tools" and mode in ("auto", "required")
    if chosen and isinstance(allowed, list):
        names = [tool.get("name") for tool in allowed if isinstance(tool, dict)]
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
    raise invalid(
        "tool_choice must be 'none', 'auto', 'required', a function by its name, or allowed_tools "
        "with a list of tools and the mode 'auto' or 'required'.",
        "tool_choice",
    )
