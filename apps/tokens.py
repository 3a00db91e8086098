"""The text of tokens on their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def decoded(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """Return the text of a few tokens, with the blank that some tokenizers drop at the front."""
    backend: Any = tokenizer
    text: str = backend.decode(list(tokens))
    first = backend.convert_ids_to_tokens(list(tokens[:1]))[0]
    if isinstance(first, str) and first.startswith("▁") and not text.startswith(" "):
        return f" {text}"
    return text
