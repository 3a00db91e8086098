"""What requests may hold, as OpenAI's API has it, and mlx-lm's words for what that lacks.

Types are strict: `"1"` is no number and 1 is no truth value. Fields nobody here knows are ignored, as clients
send many; those that would change the answer and cannot be served are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ApiError, invalid
from .limits import MAX_BIASES, MAX_CHOICES, MAX_LOGPROBS, MAX_MESSAGES, MAX_STOPS, MAX_TOOLS

Text = Annotated[str, Field(max_length=2**24)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Context = Annotated[int, Field(ge=1, le=2**20)]


class Strict(BaseModel):
    """No conversions, no infinities, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: Text


class CalledFunction(Strict):
    """Which function an earlier answer called; arguments are a JSON object as text.

    Clients replay what models wrote and some send the object itself, so anything is taken.
    """

    name: Text
    arguments: Text | dict[str, Any] | list[Any] | float | bool | None = "{}"


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None


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


class Sampling(Strict):
    """What both kinds of requests share. None takes the server's default."""

    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Penalty | None = None
    presence_context_size: Context | None = None
    frequency_penalty: Penalty | None = None
    frequency_context_size: Context | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repetition_context_size: Context | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,10}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    draft_details: bool | None = Field(
        None, description="Report every token with the stream that proposed it (0: main stream)."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, harmless in _UNSUPPORTED.items():
                if values.get(name) not in (None, *harmless):
                    raise ValueError(f"{name} is not supported by this server; leave it out.")
        return values


# Words of OpenAI's that would change the answer, and the values that change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "suffix": ("",),
    "web_search_options": (),
}


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = Field(
        None,
        description=(
            "`required` and a named function need the extra `grammar` and a model that writes "
            "arguments as JSON."
        ),
    )
    parallel_tool_calls: bool | None = Field(
        None, description="False: at most one call where calls are `required`."
    )
    response_format: ResponseFormat | None = None
    stop_in_reasoning: bool | None = Field(
        None, description="True: `stop` ends a thinking model's answer inside its thoughts too."
    )
    chat_template_kwargs: (
        Annotated[
            dict[str, bool | int | float | Text | None],
            Field(max_length=32),
        ]
        | None
    ) = Field(None, description="Further arguments of the model's chat template.")


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenId], Field(min_length=1, max_length=2**20)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, max_length=2**20)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


def parsed_chat(values: dict[str, Any]) -> ChatRequest:
    """Return the request for a chat's next answer.

    Raises:
        ApiError: a field is missing, of the wrong type, or out of range.
    """
    return parsed(ChatRequest, values)


def parsed_completion(values: dict[str, Any]) -> CompletionRequest:
    """Return the request to continue texts.

    Raises:
        ApiError: a field is missing, of the wrong type, or out of range.
    """
    return parsed(CompletionRequest, values)


Kind = TypeVar("Kind", bound=BaseModel)


def parsed(kind: type[Kind], values: Any, at: tuple[str | int, ...] = ()) -> Kind:
    """Return a part of a request, which stands `at` a place in it.

    Raises:
        ApiError: a field is missing, of the wrong type, or out of range.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explained(error, at) from None


def _explained(error: ValidationError, at: tuple[str | int, ...]) -> ApiError:
    """Return the first thing wrong, as a sentence that names the field.

    Of a field that may be of several types the innermost complaint tells most.
    """
    found = error.errors(include_url=False, include_input=False, include_context=False)
    first = found[0]
    root = first["loc"][:1]
    worst = max((one for one in found if one["loc"][:1] == root), key=lambda one: len(one["loc"]))
    place = ".".join(str(part) for part in (*at, *worst["loc"])[:8])
    message = worst["msg"].removeprefix("Value error, ")
    param = str((*at, *root)[0]) if at or root else None
    return invalid(f"{place}: {message}" if place else message, param)
