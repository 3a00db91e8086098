"""A request to Anthropic's Messages API as a chat request.

messages    user                       assistant            user
blocks      text  tool_result          thinking  tool_use   ...
chat        tool  user                 assistant            ...
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import NO_THREADS, ApiError, invalid
from ..limits import MAX_MESSAGES, MAX_TOOLS
from ..messages_schema import Count, Strict, Text, as_text
from ..parts import output_of, text_of, type_of, unreadable, wrong
from ..schema import ChatRequest, parsed, parsed_chat

Json = dict[str, Any]
Place = tuple[str | int, ...]


class Turn(Strict):
    """What one side said; content is text or blocks."""

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)]


class ClientTool(Strict):
    """A function the model may call; input_schema is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: Text | None = None
    input_schema: dict[str, Any]


class ToolChoice(Strict):
    """Whether the model calls a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict):
    """Whether the model thinks; budgets are not kept."""

    type: Literal["enabled", "disabled", "adaptive"]


class JsonOutput(Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    """What the answer's text must be, and how much the model thinks."""

    format: JsonOutput | None = None
    effort: Text | None = None


class MessageRequest(Strict):
    """The body of POST /v1/messages; further sampling options are those of a chat."""

    model: Text | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Text | list[dict[str, Any]] | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stop_sequences: list[Text] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutput | None = None


class _ToolUse(Strict):
    """A call, which chats take as it is, whatever the model wrote."""

    id: Any
    name: Any = None
    input: Any = None


class _ToolResult(Strict):
    tool_use_id: Any
    content: Any = None


class _Thought(Strict):
    thinking: Text


# Its fields that are not a chat's, or that mean something else there.
_OWN = set(MessageRequest.model_fields) - {
    *("model", "max_tokens", "stream", "temperature", "top_p", "top_k", "chat_template_kwargs"),
}
_NO_CHAT = {"n", "stream_options", "logprobs", "top_logprobs", "response_format", "stop"}
_UNSUPPORTED = ("mcp_servers", "container", "compaction")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_TEXT = frozenset({"text"})
# What chats call a field, and what it is called here.
NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}


def parsed_message(values: Json, *, counting: bool = False) -> ChatRequest:
    """Return the chat that a request stands for.

    counting: its tokens are to be counted, not answered.

    Raises:
        ApiError: it makes no sense.
    """
    for name in _UNSUPPORTED:
        if values.get(name):
            raise invalid(f"{name} is not supported by this server; leave it out.", name)
    if values.get("thread"):
        raise invalid(
            "thread is not supported by this server, which keeps no conversations; leave it out and "
            "send the whole conversation.",
            "thread",
            NO_THREADS,
        )
    fields = parsed(MessageRequest, values)
    if fields.max_tokens is None and not counting:
        raise invalid(
            "max_tokens: the field is missing; say how long answers may be.", "max_tokens"
        )
    body = {name: value for name, value in values.items() if name not in _OWN | _NO_CHAT}
    messages: list[Json] = []
    if system := text_of(fields.system, ("system",), _TEXT):
        messages.append({"role": "system", "content": system})
    for place, turn in enumerate(fields.messages):
        messages += _messages(turn, ("messages", place))
    body["messages"] = messages
    last = messages[-1]
    if last["role"] == "assistant" and last["content"] and not last.get("tool_calls"):
        body["continue_final_message"] = True  # as Anthropic's API has it
    body |= _tools(fields)
    if fields.stop_sequences:
        body["stop"] = fields.stop_sequences
    if fields.thinking is not None:
        thinks = fields.thinking.type != "disabled"
        body["chat_template_kwargs"] = {
            "enable_thinking": thinks,
            **(fields.chat_template_kwargs or {}),
        }
    config = fields.output_config or OutputConfig()
    if schema := config.format or fields.output_format:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"schema": schema.schema_},
        }
    if config.effort:
        body["reasoning_effort"] = config.effort
    try:
        return parsed_chat(body)
    except ApiError as error:
        raise error.renamed(NAMES) from None


def _messages(turn: Turn, at: Place) -> list[Json]:
    """Return a turn as messages: results of tools first, as answers to the calls before them."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    texts: list[str] = []
    thought = ""
    calls: list[Json] = []
    results: list[Json] = []
    for place, block in enumerate(turn.content):
        where = (*at, "content", place)
        kind = type_of(block, where)
        if kind == "tool_result" and turn.role == "user":
            result = parsed(_ToolResult, block, where)
            content = output_of(result.content, (*where, "content"), _TEXT)
            results.append({"role": "tool", "tool_call_id": result.tool_use_id, "content": content})
        elif kind == "tool_use" and turn.role == "assistant":
            use = parsed(_ToolUse, block, where)
            function = {"name": use.name, "arguments": as_text(use.input)}
            calls.append({"id": use.id, "type": "function", "function": function})
        elif kind == "thinking" and turn.role == "assistant":
            thought += parsed(_Thought, block, where).thinking
        elif kind == "document":
            texts.append(_document(block, where))
        elif kind != "redacted_thinking":  # which only Anthropic can read
            texts.append(text_of([block], (*at, "content"), _TEXT))
    text = "".join(texts)
    if turn.role != "assistant":
        return [*results, {"role": turn.role, "content": text}] if texts or not results else results
    message: Json = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return [message]


def _document(block: Json, at: Place) -> str:
    """Return the text of a document that is text."""
    source = block.get("source")
    if not isinstance(source, dict) or source.get("type") != "text":
        raise unreadable("document", at)
    data = source.get("data")
    if not isinstance(data, str):
        raise wrong((*at, "source"), "data must be text.")
    return data


def _tools(fields: MessageRequest) -> Json:
    """Return a chat's tools and choice among them."""
    tools = []
    for place, tool in enumerate(fields.tools or ()):
        at = ("tools", place)
        if type_of(tool, at) not in ("", "custom"):
            raise unreadable(f"{tool['type']}", at)
        read = parsed(ClientTool, tool, at)
        function: Json = {"name": read.name, "parameters": read.input_schema}
        if read.description is not None:
            function["description"] = read.description
        tools.append({"type": "function", "function": function})
    made: Json = {"tools": tools or None}
    if (choice := fields.tool_choice) is not None:
        if choice.type == "tool" and choice.name is None:
            raise invalid("tool_choice: tool needs the name of one of the tools.", "tool_choice")
        named = {"type": "function", "function": {"name": choice.name}}
        made["tool_choice"] = _CHOICES.get(choice.type, named)
        made["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return made
