"""The turns of a conversation as chat templates take them, which is not always the same.

    arguments of calls    an object, or the JSON text itself (DeepSeek)
    ids of calls          any, or nine letters and digits (Mistral)

Which form a model's template takes is found by rendering a short conversation, once; should it
refuse a particular history all the same, the others are tried. What a client replays of a model's
own bad calls is passed on as it was written, so that no conversation is stuck.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...prompts.control import ControlTokens
from .messages_schema import Message, ToolCall

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Turn = dict[str, Any]


@dataclass(frozen=True)
class CallForm:
    """How earlier calls are put to a template.

    as_text: arguments as JSON text. short_ids: ids of nine characters. wrapped: what is no JSON
    object is put into one.
    """

    as_text: bool = False
    short_ids: bool = False
    wrapped: bool = False


OBJECTS, TEXTS = CallForm(), CallForm(as_text=True)
LAST_RESORTS = (
    CallForm(wrapped=True),
    CallForm(short_ids=True),
    CallForm(short_ids=True, as_text=True),
    CallForm(short_ids=True, wrapped=True),
)


class History:
    """Renders messages with one model's chat template.

    control: tokens that users and tools may not write; None: they may.
    """

    def __init__(self, tokenizer: TokenizerWrapper, control: ControlTokens | None) -> None:
        self.tokenizer = tokenizer
        self.control = control

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """Return the text of a conversation that asks for its next answer.

        Raises:
            Exception: whatever the template raises, if it does so in every form.
        """
        if not any(message.tool_calls for message in messages):
            return self._rendered(messages, OBJECTS, options)
        first: Exception | None = None
        for form in (*self._forms, *LAST_RESORTS):
            try:
                return self._rendered(messages, form, options)
            except Exception as error:
                first = first or error
        assert first is not None
        raise first

    def turn(self, message: Message, form: CallForm = OBJECTS) -> Turn:
        """Return a message as templates expect it."""
        content = message.content
        if content is None:
            content = ""
        elif not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        turn: Turn = {"role": role, "content": self._safe(content, role)}
        if message.name is not None:
            turn["name"] = self._safe(message.name, role)
        if (number := _id(message.tool_call_id, form)) is not None and role == "tool":
            turn["tool_call_id"] = number
        thought = message.reasoning_content or message.reasoning
        if thought:
            # Templates read either word.
            turn["reasoning_content"] = turn["reasoning"] = self._safe(thought, role)
        if message.tool_calls:
            turn["tool_calls"] = [self._call(call, form) for call in message.tool_calls]
        return turn

    def _rendered(self, messages: Sequence[Message], form: CallForm, options: Any) -> str:
        turns = [self.turn(message, form) for message in messages]
        options = {"add_generation_prompt": True, **options}
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))

    def _safe(self, text: str, role: str) -> str:
        """Return a text without control tokens where its author has no right to any."""
        return text if self.control is None else self.control.of_turn(role, text)

    def _call(self, call: ToolCall, form: CallForm) -> Turn:
        function = call.function
        arguments: Any = function.arguments
        if not isinstance(arguments, str):  # from clients that send the object itself
            arguments = json.dumps(arguments, ensure_ascii=False)
        arguments = self._safe(arguments, "assistant")
        if not form.as_text:
            values = _object(arguments)
            if values is not None:
                arguments = values
            elif form.wrapped:
                arguments = {"arguments": arguments}
        number = _id(call.id, form)
        made = {} if number is None else {"id": number}
        name = self._safe(function.name, "assistant")
        return {**made, "type": "function", "function": {"name": name, "arguments": arguments}}

    @cached_property
    def _forms(self) -> list[CallForm]:
        """Return both forms, first the one in which the template shows calls as they were made."""
        call = ToolCall.model_validate(
            {"id": "abcdefghi", "function": {"name": "look_up", "arguments": '{"word": "quince"}'}}
        )
        messages = [
            Message(role="user", content="Hi"),
            Message(role="assistant", tool_calls=[call]),
            Message(role="tool", content="7", tool_call_id="abcdefghi"),
        ]

        def shows_calls(form: CallForm) -> bool:
            try:
                text = self._rendered(messages, form, {})
            except Exception:  # of the template's
                return False
            as_json = "'quince'" not in text and '\\"' not in text
            return as_json and "look_up" in text and "quince" in text

        return sorted((OBJECTS, TEXTS), key=lambda form: not shows_calls(form))


def _object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text is, None if it is none or holds half a character."""
    try:
        values = json.loads(text or "{}")
        json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _id(given: str | None, form: CallForm) -> str | None:
    """Return a call's id in a form; where ids must be short there must be one."""
    if not form.short_ids:
        return given
    return hashlib.sha256((given or "").encode("utf-8", "replace")).hexdigest()[:9]
