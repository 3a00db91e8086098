"""The text of tokens on their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


PART = "‥"  # a token that is part of a character
_LONGEST = 4  # tokens of a character


class TokenTexts:
    """The text of one token after the other, as they follow each other."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self.tokenizer = tokenizer
        self.unfinished: list[int] = []

    def next(self, token: int) -> str:
        """Return a token's text; of a character in several tokens all but the last are `PART`."""
        text = decoded(self.tokenizer, [*self.unfinished, token])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self.unfinished) < _LONGEST:
            self.unfinished.append(token)
            return PART
        self.unfinished = []
        return text


def decoded(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """Return the text of a few tokens, with the blank that some tokenizers drop at the front."""
    backend: Any = tokenizer
    text: str = backend.decode(list(tokens))
    first = backend.convert_ids_to_tokens(list(tokens[:1]))[0]
    if isinstance(first, str) and first.startswith("▁") and not text.startswith(" "):
        return f" {text}"
    return text
