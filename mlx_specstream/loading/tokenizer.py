"""A folder's tokenizer: that there is one, and that it decodes what its vocabulary is.

mlx-lm goes by the decoder a tokenizer names. Some byte-level vocabularies, whose tokens spell a
blank as Ġ, come with the decoder of SentencePiece, whose tokens spell it as ▁: their text would
keep the Ġ.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_BYTE_LEVEL_BLANK, _SENTENCEPIECE_BLANK = "Ġ", "▁"


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
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer
    from mlx_lm.tokenizer_utils import TokenizerWrapper as Wrapper
    from tokenizers import decoders

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not is_byte_level(tokenizer.get_vocab()):
        return tokenizer
    blank = tokenizer.convert_tokens_to_ids(_BYTE_LEVEL_BLANK)
    if _BYTE_LEVEL_BLANK in tokenizer.decode([blank]):
        backend.decoder = decoders.ByteLevel()
    detokenizer = tokenizer.detokenizer
    for _ in range(2):  # a text's first blank is dropped
        detokenizer.add_token(blank)
    detokenizer.finalize()
    if _BYTE_LEVEL_BLANK in detokenizer.text:
        # Its own attributes (template, tool calls, end tokens) stay as mlx-lm found them.
        assert isinstance(tokenizer, Wrapper)
        if hasattr(tokenizer, "_detokenizer_class"):  # mlx-lm 0.31 makes one from it every time
            tokenizer._detokenizer_class = BPEStreamingDetokenizer
        else:
            tokenizer._detokenizer = BPEStreamingDetokenizer(tokenizer)
    return tokenizer


def is_byte_level(vocabulary: dict[str, int]) -> bool:
    """Tell whether tokens spell a blank as byte-level ones do.

    Counted, because large SentencePiece vocabularies hold Ġ as a letter of Maltese.
    """
    if _BYTE_LEVEL_BLANK not in vocabulary:
        return False
    begin = [token[:1] for token in vocabulary]
    return begin.count(_BYTE_LEVEL_BLANK) > begin.count(_SENTENCEPIECE_BLANK)
