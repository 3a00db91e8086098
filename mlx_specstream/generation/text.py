"""Tokens in, text out: an answer as it grows, and when it is over.

It ends with an end-of-turn token, a completed stop string or the last token of its budget,
wherever in an accepted path that falls. Characters of several bytes come out when they are
whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from .stop import StopStrings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

FinishReason = Literal["stop", "length"]


class Detokenizer(Protocol):
    """What mlx-lm's streaming detokenizers offer."""

    def add_token(self, token: int) -> None: ...
    def finalize(self) -> None: ...
    @property
    def last_segment(self) -> str: ...


@runtime_checkable
class Stops(Protocol):
    """What finds an answer's end in its text, as `StopStrings` does; `found`: what ended it."""

    found: str | None

    def feed(self, text: str) -> tuple[str, bool]: ...
    def flush(self) -> str: ...


def detokenizer_for(tokenizer: TokenizerWrapper, *, continues: bool) -> Detokenizer:
    """Return what turns an answer's tokens into text.

    continues: the answer goes on with a text, so the blank it may begin with is part of it;
    detokenizers drop a text's first blank, which here is not the first.
    """
    detokenizer: Detokenizer = tokenizer.detokenizer
    if continues:
        for token in tokenizer.encode("a", add_special_tokens=False):
            detokenizer.add_token(token)
        _ = detokenizer.last_segment
    return detokenizer


def continues_text(tokenizer: TokenizerWrapper, prompt: object, ids: Sequence[int]) -> bool:
    """Tell whether an answer goes on with its prompt's text: ids and control tokens begin a turn."""
    added: Collection[int] = getattr(tokenizer, "added_tokens_decoder", {})
    return isinstance(prompt, str) and ids[-1] not in added


@dataclass(frozen=True)
class TextPiece:
    """A token and the text it completes, which may be empty; the last one says why it is last."""

    token: int
    origin: int
    text: str
    finish_reason: FinishReason | None = None


class TextAssembler:
    """Turns tokens into pieces of text until the answer is over. `max_tokens` < 0: no limit.

    stop: strings that end it, or what finds its end in its own way.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        eos_token_ids: Collection[int],
        stop: str | Sequence[str] | Stops | None = (),
        max_tokens: int = -1,
    ) -> None:
        self.detokenizer = detokenizer
        self.eos_token_ids = eos_token_ids
        self.stop: Stops = stop if isinstance(stop, Stops) else StopStrings(stop)
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def take(self, tokens: Sequence[int], origins: Sequence[int]) -> list[TextPiece]:
        """Return the pieces of a step's tokens up to the answer's end, at least one."""
        pieces = []
        for token, origin in zip(tokens, origins, strict=True):
            text = self._text_of(token)
            pieces.append(TextPiece(token, origin, text, self.finish_reason))
            if self.finish_reason is not None:
                break
        return pieces

    def cut(self) -> str:
        """End the answer here, as if its budget were spent; return the text that was held back."""
        self.finish_reason = "length"
        return self._rest()

    def _text_of(self, token: int) -> str:
        """Return the text that `token` completes, and set the reason if it is the last one."""
        self.num_tokens += 1
        if token in self.eos_token_ids:
            self.finish_reason = "stop"
            return self._rest()
        self.detokenizer.add_token(token)
        text, stopped = self.stop.feed(self.detokenizer.last_segment)
        if stopped:
            self.finish_reason = "stop"
        elif self.num_tokens == self.max_tokens:
            self.finish_reason = "length"
            text += self._rest()
        return text

    def _rest(self) -> str:
        """Return the text that detokenizer and stop strings were holding back."""
        self.detokenizer.finalize()
        text, stopped = self.stop.feed(self.detokenizer.last_segment)
        if stopped:
            self.finish_reason = "stop"
            return text
        return text + self.stop.flush()
