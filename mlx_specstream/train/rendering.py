r"""A conversation as decoding sees it: the prompt's very tokens, then the answer's.

Decoding renders the earlier turns and the template's opening of an answer. Training must begin with
these tokens, whatever a rendering of the whole conversation looks like; where templates write
thoughts the two need not agree:

    opening of the answer            the whole conversation
    <assistant>                      <assistant>yes<end>                 as it should be
    <assistant><think>\n             <assistant><think>\n\n</think>yes   \n\n may be one token
    <assistant><think>\n             <assistant>yes<end>                 the thought is dropped
    <assistant><channel><end>        <assistant>yes<end>                 an empty one is appended
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

THOUGHTS = (
    ("<think>", "</think>"),
    ("<|channel>", "<channel|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
)
"""Marks that open and close a thought."""

_MARK = "theanswerstandshere"


def conversation_tokens(
    messages: Sequence[Mapping[str, Any]], tools: list[Any] | None, tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Return the prompt's tokens and the answer's, which is the last message.

    tokenizer: of mlx-lm or of transformers.

    Raises:
        ValueError: the template does not show the answer. Whatever else the template raises.
    """

    def render(turns: Sequence[Mapping[str, Any]], opening: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tools=tools,
            add_generation_prompt=opening,
            tokenize=False,
        )
        return str(text)

    prompt, whole = render(messages[:-1], opening=True), render(messages)
    if whole.startswith(prompt):
        answer = whole[len(prompt) :]
    else:
        marked = render([*messages[:-1], {**messages[-1], "content": _marked(messages[-1])}])
        at = marked.find(_MARK)
        if at < 0 or whole[:at] != marked[:at]:
            raise ValueError("it does not show the last answer")
        answer = _rest_of_thought(prompt, messages[-1]) + whole[at:]
    given = list(tokenizer.encode(prompt, add_special_tokens=False))
    together = list(tokenizer.encode(prompt + answer, add_special_tokens=False))
    if together[: len(given)] == given:
        return given, together[len(given) :]
    return given, list(tokenizer.encode(answer, add_special_tokens=False))


def _marked(message: Mapping[str, Any]) -> str:
    """Return the message's content with the mark for its answer, behind a thought it may hold."""
    content = str(message.get("content") or "")
    for _, closes in THOUGHTS:
        if closes in content:
            return content.rpartition(closes)[0] + closes + _MARK
    return _MARK


def _rest_of_thought(prompt: str, message: Mapping[str, Any]) -> str:
    """Return the thought that an open one at the prompt's end is to become, with its end."""
    for opens, closes in THOUGHTS:
        if prompt.rfind(opens) > prompt.rfind(closes):
            said = (message.get(key) for key in ("reasoning_content", "reasoning", "thinking"))
            thought = next((text for text in said if text), None)
            content = message.get("content") or ""
            if thought is None and closes in content:
                thought = content.partition(closes)[0].replace(opens, "", 1)
            return f"{(thought or '').strip()}\n{closes}\n\n"
    return ""


def has_chat_template(tokenizer: Any) -> bool:
    """Tell whether a tokenizer of mlx-lm or transformers turns messages into text."""
    return bool(getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", None)))


def end_tokens(tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer."""
    ids = getattr(tokenizer, "eos_token_ids", None)  # transformers' own is a single one
    return set(ids) if isinstance(ids, list | tuple | set) else {tokenizer.eos_token_id}
