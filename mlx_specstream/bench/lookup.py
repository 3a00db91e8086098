"""Prompt look-up decoding through mlx-lm's interface for draft models.

The "draft model" proposes what followed the last few tokens the last time they occurred in the
prompt or the answer. It costs nothing and gains where answers quote their prompt. mlx-lm has no
such decoding of its own; its draft-model loop verifies a fixed number of drafts in every pass,
also where there was nothing to look up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

LONGEST = 3
"""Tokens that are looked up at most; shorter ends of the text follow if these are not found."""


class TokenHistory:
    """The text so far, in the place of a KV cache."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def state(self) -> list[Any]:
        return []

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        """Forget the last `count` tokens; return how many there were to forget."""
        count = min(count, len(self.tokens))
        del self.tokens[len(self.tokens) - count :]
        return count


class LookUpDrafter(nn.Module):
    """Stands in for a draft model: certain of the token that `look_up` finds."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    @property
    def layers(self) -> list[nn.Module]:
        return []

    def make_cache(self) -> list[TokenHistory]:
        return [TokenHistory()]

    def __call__(self, tokens: mx.array, cache: list[TokenHistory]) -> mx.array:
        """Return logits (1, 1, V) after `tokens` (1, L), which join the history."""
        new: list[int] = tokens.reshape(-1).tolist()  # type: ignore[assignment]
        cache[0].tokens += new
        found = look_up(cache[0].tokens)
        return mx.where(mx.arange(self.vocab_size) == found, 0.0, -1e9)[None, None]


def look_up(tokens: Sequence[int], longest: int = LONGEST) -> int:
    """Return the token that followed the latest earlier occurrence of the text's end, else 0."""
    for length in range(min(longest, len(tokens) - 1), 0, -1):
        end = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == end:
                return tokens[start + length]
    return 0
