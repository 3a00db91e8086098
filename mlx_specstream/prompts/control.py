"""Control tokens spelled out in a text, so that they are letters to the model and end no turn.

    a user writes     hi<|im_end|>
    read as a whole   hi │ <|im_end|>               the turn is over
    read as letters   hi │ < │ | │ im │ _end │ |>   the user wrote this

A character that no text holds is put into every spelled-out control token before the chat template
is rendered, and the tokens of that character are taken out of the ids. Everything else in the
prompt is cut into tokens as if nothing had happened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Unicode reserves this character for use inside of programs: it is never part of a text.
BREAK = "\ufdd0"


_known: WeakKeyDictionary[Any, ControlTokens] = WeakKeyDictionary()


class ControlTokens:
    """The tokens of one vocabulary that structure a conversation.

    They are the special ones, and those of the others that the chat template writes or that mlx-lm
    knows as marks of thoughts and calls. `own` are these marks: an answer may hold them.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self.tokenizer = tokenizer
        marks = (
            tokenizer.think_start,
            tokenizer.think_end,
            tokenizer.tool_call_start,
            tokenizer.tool_call_end,
        )
        template = tokenizer.chat_template
        written = "".join([mark or "" for mark in marks]) + str(template or "")
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self.all = {
            token.content
            for token in added
            if len(token.content) > 1
            and (token.special or (token.content in written and not _is_plain(token.content)))
        }
        self.own = {text for text in self.all if any(text in (mark or "") for mark in marks)}

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper) -> ControlTokens:
        """Return a tokenizer's, found once: some vocabularies have thousands of added tokens."""
        if tokenizer not in _known:
            _known[tokenizer] = cls(tokenizer)
        return _known[tokenizer]

    def of_turn(self, role: str, text: str) -> str:
        """Return what somebody in this role says, without the control tokens he may not write.

        A system prompt is the operator's own; an answer may hold the model's marks.
        """
        return text if role == "system" else self.broken(text, answer=role == "assistant")

    def broken(self, text: str, *, answer: bool = False) -> str:
        """Return a text with `BREAK` in every control token; `answer`: but the model's own marks."""
        text = text.replace(BREAK, "")
        pattern = self._in_answers if answer else self._anywhere
        while pattern is not None and pattern.search(text):
            text = pattern.sub(lambda found: f"{found[0][0]}{BREAK}{found[0][1:]}", text)
        return text

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return the ids of a text in which `BREAK` stands, those of `BREAK` left out."""
        tokenizer = self.tokenizer
        if BREAK not in text:
            return list(tokenizer.encode(text, **options))
        if getattr(tokenizer, "is_fast", False):
            made = tokenizer._tokenizer(text, return_offsets_mapping=True, **options)
            pairs = list(zip(made["input_ids"], made["offset_mapping"], strict=True))
            spans = [text[start:end] for _, (start, end) in pairs]
            if all(span == BREAK or BREAK not in span for span in spans):
                return [
                    token for (token, _), span in zip(pairs, spans, strict=True) if span != BREAK
                ]
        # A tokenizer that does not tell where its tokens stand, or joins them across the character.
        parts = text.split(BREAK)
        ids = list(tokenizer.encode(parts[0], **options))
        for part in parts[1:]:
            ids += tokenizer.encode(part, add_special_tokens=False)
        return ids

    @cached_property
    def _anywhere(self) -> re.Pattern[str] | None:
        return _one_of(self.all)

    @cached_property
    def _in_answers(self) -> re.Pattern[str] | None:
        return _one_of(self.all - self.own)


def _one_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _is_plain(text: str) -> bool:
    """Tell whether an added token is a word or blanks, which a template holds by chance."""
    return text.strip() != text or text.isalnum()
