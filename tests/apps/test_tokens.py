"""The bytes of tokens in every kind of vocabulary, and their text as they follow each other."""

from __future__ import annotations

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken

from mlx_specstream.apps.tokens import PART, TokenBytes, TokenTexts
from mlx_specstream.loading.tokenizer import spelling_of
from tests.support import tiny
from tests.support.tokenizers import KINDS, TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_the_texts_bytes(kind: str) -> None:
    made, spelling = KINDS[kind]
    tokenizer = TokenizerWrapper(made())
    assert spelling_of(tokenizer) == spelling
    tokens = TokenBytes(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(map(tokens.of, ids)).decode().removeprefix(" ") == TEXT
    assert any(len(tokens.of(token)) == 1 and tokens.of(token)[0] > 127 for token in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_stand_for_what_they_say(kind: str) -> None:
    tokenizer = TokenizerWrapper(KINDS[kind][0]())
    tokenizer.add_tokens([AddedToken("<é ▁Ġ>", special=False, normalized=False)])
    (token,) = tokenizer.encode("<é ▁Ġ>", add_special_tokens=False)
    assert TokenBytes(tokenizer).of(token).decode() == "<é ▁Ġ>"


def test_an_id_beyond_the_vocabulary_has_no_bytes() -> None:
    assert TokenBytes(tiny.byte_tokenizer()).of(10_000) == b""


def test_parts_of_a_character_are_told_as_such() -> None:
    texts = TokenTexts(TokenBytes(tiny.byte_tokenizer()))
    assert [texts.next(token) for token in "é👍!".encode()] == [
        *(PART, "é"),
        *(PART, PART, PART, "👍"),
        "!",
    ]
    # Bytes that become no character are shown as one that is unknown.
    assert [texts.next(token) for token in b"\xc3!"] == [PART, "�!"]
