"""The tokenizer inside a GGUF file, rebuilt as Hugging Face files: vocabulary, merges, special tokens, chat template.

Two kinds are rebuilt: byte-level BPE ("gpt2"), here, and SentencePiece BPE ("llama"), in `sentencepiece.py`. A GGUF
file names how text is cut before byte-level merging (`tokenizer.ggml.pre`) but does not say what the name means; `CUTS`
does, a row per name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ...errors import CheckpointError
from .file import GGUFFile
from .sentencepiece import CONTROL, USER_DEFINED, as_pieces, piece_bpe


@dataclass(frozen=True)
class Cut:
    """How a text is cut into pieces before merging, and what goes with it."""

    pieces: Callable[[], pre_tokenizers.PreTokenizer]
    normal_form: bool = False
    """Text is brought to Unicode NFC first."""
    whole_words: bool = False
    """A piece that is in the vocabulary is taken as it is, without merging."""


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _words(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Contractions, words with one leading sign, runs of `digits`, signs with line ends, spaces."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def pieces() -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return pieces


_LLAMA3 = Cut(_words(r"\p{N}{1,3}"), whole_words=True)
CUTS: dict[str, Cut] = {
    "gpt-2": Cut(_gpt2),
    "smollm": Cut(_digits_then_gpt2),
    "starcoder": Cut(_digits_then_gpt2),
    "refact": Cut(_digits_then_gpt2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Cut(_words(r"\p{N}"), normal_form=True),
}
"""By `tokenizer.ggml.pre`."""


def tokenizer_files(gguf: GGUFFile) -> dict[str, str]:
    """Return the tokenizer's files as name -> text: tokenizer.json, tokenizer_config.json, chat_template.jinja.

    Raises:
        CheckpointError: no tokenizer, one that is not BPE, an unknown way of cutting, or damaged tables.
    """
    tokenizer = build_tokenizer(gguf)
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(_settings(gguf), indent=2, ensure_ascii=False) + "\n",
    }
    if "tokenizer.chat_template" in gguf.metadata:
        files["chat_template.jinja"] = gguf.text("tokenizer.chat_template")
    return files


def build_tokenizer(gguf: GGUFFile) -> Tokenizer:
    """Return the fast tokenizer the file describes."""
    kind = gguf.text("tokenizer.ggml.model", "")
    if kind not in ("gpt2", "llama"):
        raise _refused(
            gguf,
            f"it is of the kind {kind or 'none'!r}, and only BPE is rebuilt, byte-level ('gpt2') or "
            "SentencePiece's ('llama')",
        )
    tokens = _tokens(gguf)
    tokenizer = _byte_level_bpe(gguf, tokens) if kind == "gpt2" else _piece_bpe(gguf, tokens)
    # SentencePiece finds the words it keeps whole after it has made spaces visible.
    tokenizer.add_special_tokens(_kept_whole(gguf, tokens, CONTROL))
    tokenizer.add_tokens(_kept_whole(gguf, tokens, USER_DEFINED, normalized=kind == "llama"))
    if tokenizer.get_vocab_size() != len(tokens):
        raise _refused(gguf, "its special tokens are not part of its vocabulary")
    return tokenizer


def token_ids(gguf: GGUFFile) -> dict[str, Any]:
    """Return the special token ids as config.json has them; several ends of a turn become a list."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids: dict[str, Any] = {key: _token_id(gguf, name) for key, name in names.items()}
    ends = [ids["eos_token_id"], _token_id(gguf, "eot"), _token_id(gguf, "eom")]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    ids["eos_token_id"] = ends if len(ends) > 1 else (ends or [None])[0]
    return {key: value for key, value in ids.items() if value is not None}


def _tokens(gguf: GGUFFile) -> list[str]:
    tokens: list[str] = gguf.items("tokenizer.ggml.tokens", str)
    if gguf.text("tokenizer.ggml.model", "") == "llama":
        tokens = as_pieces(tokens, gguf.items("tokenizer.ggml.token_type", int))
    if len(set(tokens)) != len(tokens):
        raise _refused(gguf, "a token comes twice in its vocabulary")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] < len(tokens):
        raise _refused(
            gguf, f"it has {len(tokens)} tokens and the model's embedding only {embedding.shape[0]}"
        )
    return tokens


def _piece_bpe(gguf: GGUFFile, tokens: list[str]) -> Tokenizer:
    if gguf.flag("tokenizer.ggml.add_space_prefix", True):
        raise _refused(gguf, "it puts a space before every text, which is not rebuilt")
    scores = gguf.items("tokenizer.ggml.scores", float)
    kinds = gguf.items("tokenizer.ggml.token_type", int)
    if not len(scores) == len(kinds) == len(tokens):
        raise _refused(
            gguf, f"it has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} token types"
        )
    tokenizer = piece_bpe(tokens, scores, kinds, _token_id(gguf, "unknown"))
    if processor := _post_processor(gguf, tokens):
        tokenizer.post_processor = processor
    return tokenizer


def _byte_level_bpe(gguf: GGUFFile, tokens: list[str]) -> Tokenizer:
    cut = CUTS.get(name := gguf.text("tokenizer.ggml.pre", ""))
    if cut is None:
        raise _refused(
            gguf, f"it cuts text in the way {name!r}, which is not among {', '.join(CUTS)}"
        )
    merges = [tuple(merge.split(" ")) for merge in gguf.items("tokenizer.ggml.merges", str)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    for merge in merges:
        if len(merge) != 2 or any(part not in vocabulary for part in (*merge, "".join(merge))):
            raise _refused(
                gguf, f"the merge {' '.join(merge)!r} is not one of two tokens to a third"
            )
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.whole_words)
    tokenizer = Tokenizer(model)
    if cut.normal_form:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut.pieces()
    tokenizer.decoder = decoders.ByteLevel()
    trim = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = _post_processor(gguf, tokens) or trim
    return tokenizer


def _post_processor(gguf: GGUFFile, tokens: list[str]) -> processors.PostProcessor | None:
    """Put the first and last token around a text where the file asks for it."""
    first, last = _token_id(gguf, "bos"), _token_id(gguf, "eos")
    ends = [
        (tokens[first], first)
        if first is not None and gguf.flag("tokenizer.ggml.add_bos_token", False)
        else None,
        (tokens[last], last)
        if last is not None and gguf.flag("tokenizer.ggml.add_eos_token", False)
        else None,
    ]
    if ends == [None, None]:
        return None
    before, after = ([end[0]] if end else [] for end in ends)
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[
            *before,
            "$A",
            *after,
            *(f"{token}:1" for token in before),
            "$B:1",
            *(f"{token}:1" for token in after),
        ],
        special_tokens=[end for end in ends if end],
    )


def _kept_whole(
    gguf: GGUFFile, tokens: list[str], kind: int, normalized: bool = False
) -> list[AddedToken]:
    kinds = gguf.items("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise _refused(gguf, f"it has {len(tokens)} tokens and {len(kinds)} token types")
    special = kind == CONTROL
    return [
        AddedToken(token, normalized=normalized, special=special)
        for token, own_kind in zip(tokens, kinds, strict=True)
        if own_kind == kind
    ]


def _settings(gguf: GGUFFile) -> dict[str, Any]:
    tokens = _tokens(gguf)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": gguf.flag("tokenizer.ggml.add_bos_token", False),
        "model_max_length": gguf.integer(f"{gguf.text('general.architecture')}.context_length"),
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = _token_id(gguf, name)
        if number is not None:
            settings[f"{key}_token"] = tokens[number]
    return settings


def _token_id(gguf: GGUFFile, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in gguf.metadata:
        return None
    number = gguf.integer(key)
    if not 0 <= number < len(gguf.items("tokenizer.ggml.tokens", str)):
        raise _refused(gguf, f"{key} is {number}, behind the end of its vocabulary")
    return number


def _refused(gguf: GGUFFile, why: str) -> CheckpointError:
    return CheckpointError(
        f"The tokenizer in {gguf.path} cannot be rebuilt: {why}; convert from the model's Hugging Face folder instead."
    )
