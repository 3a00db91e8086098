"""Messages to token ids, through the model's chat template where it has one.

Works on a copy of the tokenizer in a thread of its own: long prompts take a while to cut into tokens, and
Hugging Face's tokenizers may not be used by two threads at once.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ...errors import OptionError, SpecStreamError, brief
from ...generation.grammar import Grammar
from ...generation.json_schema import schema_text
from ...prompts.control import ControlTokens
from ..thinking import ThoughtMarks
from .errors import CONTEXT_EXCEEDED, ApiError, invalid
from .forced_calls import forced_calls
from .grammars import GrammarStore
from .history import History
from .messages_schema import PlainFormat, SchemaFormat
from .schema import ChatRequest, CompletionRequest
from .thought_rules import behind_thought
from .tool_calls import ToolFormat

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# What `apply_chat_template` takes itself; the rest are the template's own variables.
_RESERVED = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    "messages",
    "tokenizer",
} - {"add_generation_prompt", "continue_final_message"}


_PIECE = 2**14  # characters that are counted at once
_EDGE = 64  # tokens that cutting a text in two may add


class PromptEncoder:
    """Turns requests into token ids within `max_tokens`; for one thread at a time.

    template_args: the chat template's variables where a request does not say.
    control_tokens: let users and tools write control tokens.

    Raises:
        OptionError: `template_args` holds what is no variable.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        vocab_size: int,
        max_tokens: int | None,
        *,
        template_args: Mapping[str, Any] | None = None,
        control_tokens: bool = False,
    ) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.template_args = dict(template_args or {})
        if taken := sorted(_RESERVED & set(self.template_args)):
            raise OptionError(
                f"--chat-template-args must not hold {taken[0]!r}: it is for the template's own "
                "variables."
            )
        self.tools = ToolFormat.of(self.tokenizer)
        self.thoughts = ThoughtMarks.of(self.tokenizer)
        self.control = ControlTokens(self.tokenizer)
        self.grammars = GrammarStore(self.tokenizer, vocab_size)
        self.history = History(self.tokenizer, None if control_tokens else self.control)

    def chat(self, request: ChatRequest) -> list[int]:
        """Return the ids that ask for a conversation's next answer.

        Raises:
            ApiError: the chat template refuses the messages, or there are too many tokens.
        """
        options: dict[str, Any] = {**self.template_args, **request.template_options}
        if taken := sorted(_RESERVED & set(request.chat_template_kwargs or {})):
            raise invalid(
                f"chat_template_kwargs must not hold {taken[0]!r}.", "chat_template_kwargs"
            )
        if request.tools and request.tool_choice != "none":
            options["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]
        history = self.history
        if not self.tokenizer.has_chat_template:
            text = "\n\n".join(history.turn(message)["content"] for message in request.messages)
            return self._checked(self._ids(text, "messages"), "messages")
        try:
            text = history.render(request.messages, **options)
        except Exception as error:  # whatever a template raises, jinja's own errors among it
            raise invalid(
                f"the model's chat template refuses the messages: {brief(error)}.", "messages"
            ) from error
        ids = self._ids(text, "messages", add_special_tokens=False)
        return self._checked(ids, "messages")

    def completion(self, request: CompletionRequest) -> list[list[int]]:
        """Return the ids of every text to continue.

        Raises:
            ApiError: a prompt is empty or too long, or holds ids the model does not have.
        """
        found = []
        for one in _prompts(request):
            ids = self._ids(one, "prompt") if isinstance(one, str) else list(one)
            if wrong := [token for token in ids if token >= self.vocab_size]:
                raise invalid(
                    f"prompt: the token id {wrong[0]} is not below {self.vocab_size}.", "prompt"
                )
            found.append(self._checked(ids, "prompt"))
        return found

    def text_lengths(self, request: CompletionRequest) -> list[int]:
        """Return how many characters every text to continue has."""
        return [
            len(one if isinstance(one, str) else self.tokenizer.decode(one))
            for one in _prompts(request)
        ]

    def grammar(self, request: ChatRequest, prompt: Sequence[int]) -> Grammar | None:
        """Return what the answer to a prompt of ids must fit, None if it may be any text.

        Of a model that thinks, what comes behind the thought must fit.

        Raises:
            ApiError: the schema or the tool choice cannot be used, or the server cannot use any.
        """
        wanted, param = request.response_format, "tool_choice"
        try:
            answer = forced_calls(request, self.tokenizer, self.tools, self.vocab_size)
            if answer is None:
                if wanted is None or isinstance(wanted, PlainFormat):
                    return None
                param = "response_format"
                schema: dict[str, Any] = {"type": "object"}
                if isinstance(wanted, SchemaFormat):
                    schema = wanted.json_schema.schema_
                answer = f"answer: %json {schema_text(schema)}"
            rules = behind_thought(answer, self.tokenizer, self.thoughts, prompt, self.vocab_size)
            return self.grammars.lark(rules)
        except SpecStreamError as error:
            raise invalid(str(error), param) from error

    def _count(self, text: str, param: str) -> None:
        """Refuse a text that is far too long before all of it is cut into tokens."""
        if self.max_tokens is None or len(text) <= max(_PIECE, self.max_tokens):
            return
        least = 0
        for start in range(0, len(text), _PIECE):
            least += len(self.tokenizer.encode(text[start : start + _PIECE])) - _EDGE
            if least > self.max_tokens:
                raise self._too_long(f"more than {least} tokens", param)

    def _ids(self, text: str, param: str, **options: Any) -> list[int]:
        self._count(text, param)
        try:
            return self.control.encode(text, **options)
        except Exception as error:  # of the tokenizer's, in Rust or Python
            raise invalid(
                f"the model's tokenizer cannot read the text: {brief(error)}.", param
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
            CONTEXT_EXCEEDED,
        )


def _prompts(request: CompletionRequest) -> list[Any]:
    """Return the texts to continue, each as text or ids."""
    prompt: Any = request.prompt
    single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    return [prompt] if single else prompt
