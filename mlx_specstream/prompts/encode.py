"""A prompt as the model reads it: through its chat template where it has one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError, brief, whole_text
from .control import ControlTokens
from .read import Prompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_MARK = "<query>"


def encode_prompt(
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    *,
    response: str | None = None,
    use_template: bool = True,
    template_options: Mapping[str, Any] | None = None,
    unfinished: bool = False,
    behind_cache: bool = False,
) -> list[int]:
    """Return the token ids of a prompt; in users' turns control tokens are letters.

    Args:
        response: how the answer begins; the model continues from there.
        unfinished: leave the last turn open, for more of it to follow.
        behind_cache: only from the last user's turn on, what precedes it being in a cache that
            was left open. As mlx-lm does it, the template's words before that turn are left out.
        use_template: False, or a tokenizer without a chat template, takes the bare text.
        template_options: further arguments of the chat template.

    Raises:
        DataError: the prompt is empty or no Unicode text, or the chat template refuses it.
    """
    if not prompt.title:
        raise DataError("the prompt is empty; say what the model is to answer.")
    if not (use_template and tokenizer.has_chat_template and prompt.messages):
        text = whole_text(prompt.bare + (response or ""), "the prompt")
        ids: list[int] = list(tokenizer.encode(text))
        return ids
    control = ControlTokens.of(tokenizer)
    turns = [dict(turn) for turn in prompt.messages]
    for turn in turns:
        turn["content"] = control.of_turn(turn["role"], turn.get("content") or "")
    if response is not None:
        turns.append({"role": "assistant", "content": response})
    open_end = unfinished or response is not None

    def rendered() -> str:
        return str(
            tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=not open_end,
                continue_final_message=open_end,
                **({"tools": list(prompt.tools)} if prompt.tools else {}),
                **(template_options or {}),
            )
        )

    try:
        text = rendered()
        if behind_cache:
            turns[-1 if response is None else -2]["content"] = _MARK
            text = text[max(rendered().find(_MARK), 0) :]
    except Exception as error:  # whatever a template raises, jinja's own errors among it
        raise DataError(
            f"the model's chat template refuses the prompt: {brief(error)}; leave out the "
            "system prompt, or ignore the chat template."
        ) from error
    return control.encode(whole_text(text, "the prompt"), add_special_tokens=False)


def template_args(text: str | None, option: str) -> dict[str, Any]:
    """Return the variables for a chat template that a JSON object names, none for None.

    Raises:
        OptionError: it is no JSON object; `option` is named.
    """
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise OptionError(f"{option} must be a JSON object like '{{\"key\": true}}', got {text!r}.")
    return values
