"""What requests may hold, as OpenAI's API has it, and mlx-lm's words for what that lacks.

Types are strict: `"1"` is no number and 1 is no truth value; but 1.0 is a whole number, for JSON does not
tell them apart. Values by which clients say "off" or "as you like" (0, -1, empty) are taken. Fields
nobody here knows are ignored, as clients send many; those that would change the answer and cannot
be served are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from .limits import (
    LONG_PROMPT,
    MAX_BIASES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOOLS,
)
from .messages_schema import (
    Context,
    FunctionChoice,
    MaxTokens,
    Message,
    Penalty,
    PlainFormat,
    ResponseFormat,
    StopString,
    StreamOptions,
    Strict,
    Text,
    TokenId,
    Tool,
    Whole,
)
from .refusals import explained


class Sampling(Strict):
    """What both kinds of requests share. None takes the server's default."""

    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = Field(None, description="-1: as many as the server allows.")
    min_tokens: Annotated[int, Field(ge=0, le=2**53), Whole] | None = Field(
        None, description="No token that ends the answer is drawn before."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = None
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), Whole] | None = Field(
        None, description="0 or -1: all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1), Whole] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Tokens that end the answer, beside the model's own."
    )
    ignore_eos: bool | None = Field(
        None, description="True: tokens that end the model's answers are not drawn."
    )
    presence_penalty: Penalty | None = None
    presence_context_size: Context | None = None
    frequency_penalty: Penalty | None = None
    frequency_context_size: Context | None = None
    repetition_penalty: (
        Annotated[Annotated[float, Field(ge=0.01, le=100)] | Literal[0], Whole] | None
    ) = Field(None, description="0 or 1: none.")
    repetition_context_size: Context | None = None
    top_logprobs: Annotated[int, Field(ge=-1, le=MAX_LOGPROBS), Whole] | None = None
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
            best_of = (values.get("n", 1),)  # the best n of n are all of them
            for name, (harmless, instead) in {
                **_UNSUPPORTED,
                "best_of": (best_of, "use n"),
            }.items():
                if values.get(name) not in (None, "", [], {}, False, *harmless):
                    raise ValueError(f"{name} is not supported by this server; {instead}.")
        return values


_LEAVE = "leave it out"
_FORMAT = "use response_format"
# Words of OpenAI's, mlx-lm's, vLLM's and llama.cpp's that would change the answer, the values beside
# empty ones that change nothing, and what to do.
_UNSUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "adapters": ((), "start the server with the adapter"),
    "allowed_token_ids": ((), "use logit_bias"),
    "audio": ((), _LEAVE),
    "bad_words": ((), "use logit_bias"),
    "dry_multiplier": ((0,), _LEAVE),
    "dynatemp_range": ((0,), _LEAVE),
    "echo": ((), _LEAVE),
    "function_call": (("none", "auto"), "use tool_choice"),
    "functions": ((), "use tools"),
    "grammar": ((), _FORMAT),
    "guided_choice": ((), _FORMAT),
    "guided_grammar": ((), _FORMAT),
    "guided_json": ((), _FORMAT),
    "guided_regex": ((), _FORMAT),
    "include_stop_str_in_output": ((), _LEAVE),
    "json_schema": ((), _FORMAT),
    "length_penalty": ((1,), _LEAVE),
    "mirostat": ((0,), _LEAVE),
    "modalities": ((["text"],), _LEAVE),
    "role_mapping": ((), _LEAVE),
    "skip_special_tokens": ((True,), _LEAVE),
    "structured_outputs": ((), _FORMAT),
    "suffix": ((), _LEAVE),
    "truncate_prompt_tokens": ((-1,), "send a shorter prompt"),
    "typical_p": ((0, 1), _LEAVE),
    "use_beam_search": ((), _LEAVE),
    "web_search_options": ((), _LEAVE),
}


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
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
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = Field(
        None, description="Further arguments of the model's chat template."
    )
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="For chat templates that know it; `none` is `enable_thinking: false`."
    )
    enable_thinking: bool | None = Field(None, description="For chat templates that know it.")
    add_generation_prompt: bool | None = Field(
        None, description="False: the prompt does not end with the beginning of an answer."
    )
    continue_final_message: bool | None = Field(
        None, description="True: the answer goes on where the last message ends."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_schema(cls, values: Any) -> Any:
        """Take a schema beside `json_object`, as llama.cpp's clients and others send it."""
        wanted = values.get("response_format") if isinstance(values, dict) else None
        if not isinstance(wanted, dict) or wanted.get("type") != "json_object":
            return values
        if (schema := wanted.get("schema")) is None:
            return values
        made = {"type": "json_schema", "json_schema": {"schema": schema}}
        return {**values, "response_format": made}

    @model_validator(mode="before")
    @classmethod
    def _keep_allowed_tools(cls, values: Any) -> Any:
        """Take OpenAI's choice among some of the tools as a choice among no others."""
        choice = values.get("tool_choice") if isinstance(values, dict) else None
        if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
            return values
        allowed = choice.get("allowed_tools")
        mode, tools = (
            (allowed.get("mode", "auto"), allowed.get("tools"))
            if isinstance(allowed, dict)
            else (None, None)
        )
        if mode not in ("auto", "required") or not isinstance(tools, list):
            raise ValueError(
                "tool_choice: allowed_tools needs a list of tools and the mode 'auto' or 'required'."
            )
        names, given = [_name_of(tool) for tool in tools], values.get("tools")
        if isinstance(given, list):
            values = {**values, "tools": [tool for tool in given if _name_of(tool) in names]}
        return {**values, "tool_choice": mode}

    @property
    def alternatives(self) -> int | None:
        """Return how many alternatives to report with every token, None for no log-probabilities.

        As in mlx-lm, `top_logprobs` alone asks for them too.
        """
        count = max(self.top_logprobs or 0, 0)
        wanted = count > 0 if self.logprobs is None else self.logprobs
        return count if wanted else None

    @property
    def is_long(self) -> bool:
        """Tell whether cutting the prompt into tokens takes long."""
        contents = [message.content or "" for message in self.messages]
        texts = [
            one if isinstance(one, str) else "".join(part.text for part in one) for one in contents
        ]
        return sum(map(len, texts)) > LONG_PROMPT

    @property
    def may_need_grammar(self) -> bool:
        """Tell whether the answer may have to fit something."""
        plain = self.response_format is None or isinstance(self.response_format, PlainFormat)
        return not plain or self.tool_choice not in (None, "none", "auto")

    @property
    def template_options(self) -> dict[str, Any]:
        """Return the arguments of the chat template."""
        options: dict[str, Any] = {"add_generation_prompt": not self.continue_final_message}
        for name in ("add_generation_prompt", "continue_final_message", "enable_thinking"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if self.reasoning_effort is not None:
            options["reasoning_effort"] = self.reasoning_effort
            if self.reasoning_effort == "none":
                options.setdefault("enable_thinking", False)
        return {**options, **(self.chat_template_kwargs or {})}


def _name_of(tool: Any) -> Any:
    """Return the name of a tool's function, None if it has none."""
    function = tool.get("function") if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


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
    logprobs: bool | Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Whole] | None = None

    @property
    def alternatives(self) -> int | None:
        """Return how many alternatives to report with every token, None for no log-probabilities.

        OpenAI's clients say it in `logprobs`, mlx-lm's in `top_logprobs`.
        """
        count = max(self.top_logprobs or 0, 0)
        if self.logprobs is None:
            return count or None
        if isinstance(self.logprobs, bool):
            return count if self.logprobs else None
        return self.logprobs

    @property
    def is_long(self) -> bool:
        """Tell whether cutting the prompts into tokens takes long."""
        texts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        return sum(len(one) for one in texts if isinstance(one, str)) > LONG_PROMPT


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
        raise explained(kind, values, error, at) from None
