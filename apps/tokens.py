"""The bytes of tokens, and their text as they follow each other."""

from __future__ import annotations

import codecs
import re
from functools import cached_property
from typing import TYPE_CHECKING

from ..loading.tokenizer import spelling_of

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

PART = "‥"  # a token that is part of a character
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))


class TokenBytes:
    """The bytes that tokens stand for, which may be part of a character.

    byte-level      Ġcaf Ã ©             a letter for each byte
    SentencePiece   ▁caf <0xC3> <0xA9>   ▁ for a blank, bytes by their numbers
    others          caf ##é              what the tokenizer says
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self.tokenizer = tokenizer

    def of(self, token: int) -> bytes:
        """Return a token's bytes, none of an id that the tokenizer does not have."""
        added = self._added.get(token)
        if added is not None:
            return added
        spelled: str | None = self.tokenizer.convert_ids_to_tokens([token])[0]
        if spelled is None:
            return b""
        spelling = spelling_of(self.tokenizer)
        if spelling == "bytes":
            return bytes(_BYTES[letter] for letter in spelled)
        if spelling == "sentencepiece":
            if found := _BYTE.fullmatch(spelled):
                return bytes.fromhex(found[1])
            return spelled.replace("▁", " ").encode()
        text: str = self.tokenizer.decode([token])
        return text.encode()

    @cached_property
    def _added(self) -> dict[int, bytes]:
        """Return the tokens that stand for what they say."""
        added = self.tokenizer.added_tokens_decoder
        return {token: str(one).encode() for token, one in added.items()}


def _letters() -> dict[str, int]:
    """Return which byte each letter of byte-level tokens is."""
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return {chr(byte): byte for byte in _PRINTABLE} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTES = _letters()


class TokenTexts:
    """The text of one token after the other, as they follow each other."""

    def __init__(self, tokens: TokenBytes) -> None:
        self.tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int) -> str:
        """Return a token's text; of a character in several tokens all but the last are `PART`."""
        data = self.tokens.of(token)
        text = self._decoder.decode(data)
        return text if text or not data else PART
