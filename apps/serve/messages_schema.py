"""What conversations in requests hold: messages, calls, tools and the formats of answers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .limits import MAX_MESSAGES, MAX_TOOLS

Text = Annotated[str, Field(max_length=2**24)]
StopString = Annotated[str, Field(max_length=1000)]


def _whole(value: Any) -> Any:
    """Return a float that is a whole number as one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
Count = Annotated[int, Field(ge=1, le=2**53), Whole]
# -1: as many as the server allows, as llama.cpp's clients and others say.
MaxTokens = Annotated[Annotated[int, Field(ge=1, le=2**53)] | Literal[-1], Whole]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1), Whole]
Penalty = Annotated[float, Field(ge=-100, le=100)]
Context = Annotated[int, Field(ge=0, le=2**20), Whole]  # 0: all of it


class Strict(BaseModel):
    """No conversions, no infinities, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: Text


class RefusalPart(Strict):
    """An earlier answer's refusal, which is text too."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        return self.refusal


class ThinkingPart(Strict):
    """An earlier answer's thoughts, which are no part of what was said."""

    type: Literal["thinking"]
    thinking: Text = ""

    @property
    def text(self) -> str:
        return ""


Part = Annotated[TextPart | RefusalPart | ThinkingPart, Field(discriminator="type")]


class CalledFunction(Strict):
    """Which function an earlier answer called; arguments are a JSON object as text.

    Clients replay what models wrote and some send the object itself, so anything is taken.
    """

    name: Text = ""
    arguments: Any = "{}"


class ToolCall(Strict):
    """A call in an earlier answer, as well as it can be read: it was the model that wrote it."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _as_it_is(cls, values: Any) -> Any:
        """Take a call without a name, of another type, or that is no object at all."""
        call = values if isinstance(values, dict) else {"arguments": values}
        function = next(
            (one for one in (call.get("function"), call.get("custom")) if isinstance(one, dict)),
            call,
        )
        arguments = function.get("arguments", function.get("input", "{}"))
        name = as_text(function.get("name")) or ""
        return {"id": as_text(call.get("id")), "function": {"name": name, "arguments": arguments}}


def as_text(value: Any) -> str | None:
    """Return a text as it is, anything else as JSON, nothing as None."""
    return value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)


def is_parts(content: Any) -> bool:
    """Tell whether a message's content is a list of parts, and not what a tool gave as JSON."""
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in content
    )


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(max_length=MAX_MESSAGES)] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _modernise(cls, values: Any) -> Any:
        """Take what OpenAI's API had before tools, and thoughts wherever clients put them."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("role") == "function":
            values["role"] = "tool"
        if values.get("function_call") and not values.get("tool_calls"):
            values["tool_calls"] = [{"function": values["function_call"]}]
        calls = values.get("tool_calls")
        if isinstance(calls, list):
            values["tool_calls"] = [call for call in calls if call is not None]
        elif not calls:
            values["tool_calls"] = None
        for name in ("reasoning", "reasoning_content"):
            if not isinstance(values.get(name), str):  # what others' APIs have of this name
                values[name] = None
        values["tool_call_id"] = as_text(values.get("tool_call_id"))
        if values.get("role") == "tool" and not is_parts(values.get("content")):
            values["content"] = as_text(values.get("content"))
        parts = values.get("content")
        if isinstance(parts, list) and not values.get("reasoning_content"):
            thoughts = [part.get("thinking") for part in parts if isinstance(part, dict)]
            if told := "".join(one for one in thoughts if isinstance(one, str)):
                values["reasoning_content"] = told
        return values


class FunctionDescription(Strict):
    """A function the model may call; parameters are a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    """Something the model may call."""

    type: Literal["function"]
    function: FunctionDescription


class NamedFunction(Strict):
    """One of the tools' functions."""

    name: Annotated[str, Field(min_length=1, max_length=256)]


class FunctionChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Strict):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None


class PlainFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON schema; `json_schema.schema` in OpenAI's requests."""

    name: Text | None = None
    description: Text | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class SchemaFormat(Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]
