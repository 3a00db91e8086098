"""Small tokenizers of every kind that models are published with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support import tiny

TEXT = "Où est\n    l'œuf ?\n  Là-bas 👍"
WORDS = ("est", "l", "Là", "bas")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SENTENCEPIECE = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
]


def _merged(words: tuple[str, ...], letters: list[str]) -> tuple[dict[str, int], list[Any]]:
    """Return a vocabulary of letters and of words that grow letter by letter, and its merges."""
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            left, right = word[: end - 1], word[end - 1]
            for part in (left, right, word[:end]):
                vocabulary.setdefault(part, len(vocabulary))
            if (left, right) not in merges:
                merges.append((left, right))
    return vocabulary, merges


def _fast(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **options
    )


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama 3's and Qwen's."""
    words = tuple(f"Ġ{word}" for word in WORDS)
    vocabulary, merges = _merged(words, tiny.byte_letters())
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend)


def sentencepiece(*, dummy_blank: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's, whose texts begin with a blank that is not shown, or Gemma's, which do not."""
    words = tuple(f"▁{word}" for word in WORDS)
    vocabulary, merges = _merged(words, ["<unk>", *_BYTES, "▁", "\n", *"-?'O"])
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    blanks = normalizers.Replace(" ", "▁")
    if dummy_blank:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
        backend.decoder = decoders.Sequence([*_SENTENCEPIECE, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = blanks
        backend.decoder = decoders.Sequence(_SENTENCEPIECE)
    return _fast(backend, unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    """As T5's and older conversions of Llama's, whose decoder is one that mlx-lm does not know."""
    words = tuple(f"▁{word}" for word in WORDS)
    vocabulary, merges = _merged(words, ["<unk>", *_BYTES, "▁", "\n", *"-?'O"])
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _fast(backend, unk_token="<unk>")


KINDS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "byte-level": (byte_level, "bytes"),
    "Llama 2's": (lambda: sentencepiece(dummy_blank=True), "sentencepiece"),
    "Gemma's": (lambda: sentencepiece(dummy_blank=False), "sentencepiece"),
    "Metaspace": (metaspace, "sentencepiece"),
}
