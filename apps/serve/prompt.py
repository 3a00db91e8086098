"""Messages to token ids, through the model's chat template where it has one.

Works on a copy of the tokenizer in a thread of its own: long prompts take a while to cut into tokens, and
Hugging Face's tokenizers may not be used by two threads at once.
"""

from __future__ import annotations

import copy
import inspect
import json
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ...errors import SpecStreamError
from ...generation.grammar import Grammar
from ...weights.hub import first_line
from .errors import ApiError, invalid
from .forced_calls import forced_calls
from .schema import ChatRequest, CompletionRequest, Message, PlainFormat, SchemaFormat
from .tool_calls import ToolFormat

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# What `apply_chat_template` takes itself; the rest are the template's own variables.
_RESERVED = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    "messages",
    "tokenizer",
}


class PromptEncoder:
    """Turns requests into token ids within `max_tokens`; for one thread at a time."""

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int, max_tokens: int | None):
        self.tokenizer = copy.deepcopy(tokenizer)
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.tools = ToolFormat.of(self.tokenizer)

    def chat(self, request: ChatRequest) -> list[int]:
        """Return the ids that ask for a conversation's next answer.

        Raises:
            ApiError: the chat template refuses the messages, or there are too many tokens.
        """
        options: dict[str, Any] = dict(request.chat_template_kwargs or {})
        if taken := sorted(_RESERVED & set(options)):
            raise invalid(
                f"chat_template_kwargs must not hold {taken[0]!r}.", "chat_template_kwargs"
            )
        if request.tools and request.tool_choice != "none":
            options["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]
        messages = [_turn(message) for message in request.messages]
        if not self.tokenizer.has_chat_template:
            text = "\n\n".join(turn["content"] for turn in messages)
            return self._checked(self._ids(text, "messages"), "messages")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:  # whatever a template raises, jinja's own errors among it
            raise invalid(
                f"the model's chat template refuses the messages: {first_line(error)}.", "messages"
            ) from error
        ids = self._ids(text, "messages", add_special_tokens=False)
        return self._checked(ids, "messages")

    def completion(self, request: CompletionRequest) -> list[list[int]]:
        """Return the ids of every text to continue.

        Raises:
            ApiError: a prompt is empty or too long, or holds ids the model does not have.
        """
        prompt: Any = request.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        found = []
        for one in prompt:
            ids = self._ids(one, "prompt") if isinstance(one, str) else list(one)
            if wrong := [token for token in ids if token >= self.vocab_size]:
                raise invalid(
                    f"prompt: the token id {wrong[0]} is not below {self.vocab_size}.", "prompt"
                )
            found.append(self._checked(ids, "prompt"))
        return found

    def grammar(self, request: ChatRequest) -> Grammar | None:
        """Return what the answer must fit, None if it may be any text.

        Raises:
            ApiError: the schema or the tool choice cannot be used, or the server cannot use any.
        """
        try:
            calls = forced_calls(request, self.tokenizer, self.tools, self.vocab_size)
        except SpecStreamError as error:
            raise invalid(str(error), "tool_choice") from error
        wanted = request.response_format
        if calls is not None or wanted is None or isinstance(wanted, PlainFormat):
            return calls
        schema: dict[str, Any] = {"type": "object"}
        if isinstance(wanted, SchemaFormat):
            schema = wanted.json_schema.schema_
        try:
            return Grammar.json_schema(self.tokenizer, schema, self.vocab_size)
        except SpecStreamError as error:
            raise invalid(str(error), "response_format") from error

    def _ids(self, text: str, param: str, **options: Any) -> list[int]:
        try:
            return list(self.tokenizer.encode(text, **options))
        except Exception as error:  # of the tokenizer's, in Rust or Python
            raise invalid(
                f"the model's tokenizer cannot read the text: {first_line(error)}.", param
            ) from error

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise invalid("the prompt is empty; give at least one token.", param)
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise self._too_long(f"{len(ids)} tokens", param)
        return ids

    def _too_long(self, size: str, param: str) -> ApiError:
        return invalid(
            f"the prompt has {size}, but this server takes at most {self.max_tokens} tokens, "
            "so that there is room for an answer; shorten it.",
            param,
            "context_length_exceeded",
        )


def _turn(message: Message) -> dict[str, Any]:
    """Return a message as chat templates expect it: text alone, arguments as objects."""
    content = message.content
    if content is None:
        content = ""
    elif not isinstance(content, str):
        content = "".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": content}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            turn[name] = value
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return turn


def _arguments(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise invalid("the arguments of a tool call must be a JSON object, as text.", "messages")
    return values
