"""A folder's tokenizer: that there is one, and that it decodes what its vocabulary is.

mlx-lm goes by the decoder a tokenizer names. Some byte-level vocabularies, whose tokens spell a
blank as Ġ, come with the decoder of SentencePiece, whose tokens spell it as ▁: their text would
keep the Ġ. And what decodes any tokenizer there begins afresh behind every line break, so that
decoders which drop a text's first blank drop one of every line's indent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from ..errors import ModelError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_BYTE_LEVEL_BLANK, _SENTENCEPIECE_BLANK, _CONTINUED = "Ġ", "▁", "##"

Spelling = Literal["bytes", "sentencepiece", "other"]
_spellings: WeakKeyDictionary[Any, Spelling] = WeakKeyDictionary()


def check_tokenizer_files(folder: Path, name: str) -> None:
    """Make sure that a model's folder holds a tokenizer's vocabulary.

    Raises:
        ModelError: it does not.
    """
    if not any(found for pattern in _FILES for found in folder.glob(pattern)):
        raise ModelError(
            f"{name} holds no tokenizer (tokenizer.json or tokenizer.model); copy the tokenizer's "
            "files of the model that it was made from into the folder."
        )


def decode_by_vocabulary(tokenizer: TokenizerWrapper) -> TokenizerWrapper:
    """Return the tokenizer, decoding bytes if its vocabulary is made of bytes."""
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, NaiveStreamingDetokenizer
    from mlx_lm.tokenizer_utils import TokenizerWrapper as Wrapper
    from tokenizers import decoders

    # Its own attributes (template, tool calls, end tokens) stay as mlx-lm found them.
    assert isinstance(tokenizer, Wrapper)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and spelling_of(tokenizer) == "bytes":
        blank = tokenizer.convert_tokens_to_ids(_BYTE_LEVEL_BLANK)
        if _BYTE_LEVEL_BLANK in tokenizer.decode([blank]):
            backend.decoder = decoders.ByteLevel()
        detokenizer = tokenizer.detokenizer
        for _ in range(2):  # a text's first blank is dropped
            detokenizer.add_token(blank)
        detokenizer.finalize()
        if _BYTE_LEVEL_BLANK in detokenizer.text:
            _decode_with(tokenizer, BPEStreamingDetokenizer)
    if type(tokenizer.detokenizer) is NaiveStreamingDetokenizer:
        _decode_with(tokenizer, WindowDetokenizer)
    return tokenizer


def _decode_with(tokenizer: TokenizerWrapper, kind: type) -> None:
    if hasattr(tokenizer, "_detokenizer_class"):  # mlx-lm 0.31 makes one from it every time
        tokenizer._detokenizer_class = kind
    else:
        tokenizer._detokenizer = kind(tokenizer)


def spelling_of(tokenizer: TokenizerWrapper) -> Spelling:
    """Return what a tokenizer's tokens are written in; found out once."""
    if tokenizer._tokenizer not in _spellings:
        _spellings[tokenizer._tokenizer] = spelling_in(tokenizer.get_vocab())
    return _spellings[tokenizer._tokenizer]


def spelling_in(vocabulary: Mapping[str, int]) -> Spelling:
    """Return what most tokens of a vocabulary are written in.

    Counted, because large SentencePiece vocabularies hold Ġ as a letter of Maltese.
    """
    begin = [token[:1] for token in vocabulary]
    blanks = begin.count(_SENTENCEPIECE_BLANK)
    if _BYTE_LEVEL_BLANK in vocabulary and begin.count(_BYTE_LEVEL_BLANK) > blanks:
        return "bytes"
    continued = sum(token.startswith(_CONTINUED) for token in vocabulary)
    return "sentencepiece" if blanks > continued else "other"


class WindowDetokenizer:
    """Decodes any tokenizer's tokens as they come: each behind those before it.

        tokens      ... | before | new      what is before the bar was decoded long ago
        text        "ca" -> "café"          given: "fé", as soon as it is whole

    The text is that of decoding all tokens at once, as long as no later token changes earlier text.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        """Begin another text."""
        self.tokens: list[int] = []
        self.text = ""
        self.offset = 0
        self._start = self._read = 0  # of the tokens before the new ones, and of the new ones

    def add_token(self, token: int) -> None:
        """Take in the next token."""
        self.tokens.append(token)
        self._take(whole=False)

    def finalize(self) -> None:
        """Give out what was held back."""
        self._take(whole=True)

    @property
    def last_segment(self) -> str:
        """Return the text that is new since the last call."""
        segment, self.offset = self.text[self.offset :], len(self.text)
        return segment

    def _take(self, *, whole: bool) -> None:
        before = self._decoded(self.tokens[self._start : self._read])
        now = self._decoded(self.tokens[self._start :])
        if len(now) > len(before) and (whole or not now.endswith("\N{REPLACEMENT CHARACTER}")):
            self.text += now[len(before) :]
            self._start, self._read = self._read, len(self.tokens)

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens)
        return text
