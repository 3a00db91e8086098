"""The tokenizer inside a GGUF file, rebuilt as Hugging Face files: vocabulary, merges, special tokens, chat template.

A GGUF file names how text is cut before merging (`tokenizer.ggml.pre`) but does not say what the name means; `CUTS`
does, a row per name. Only byte-level BPE is rebuilt.
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

from mlx_specstream.convert.gguf.file import GGUFFile
from mlx_specstream.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4
"""Token types that stand for themselves in a text: special ones and words kept whole."""


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
        CheckpointError: no tokenizer, one that is not byte-level BPE, an unknown way of cutting, or damaged tables.
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
    if kind != "gpt2":
        raise _refused(
            gguf,
            f"it is of the kind {kind or 'none'!r}, and only byte-level BPE ('gpt2') is rebuilt",
        )
    cut = CUTS.get(name := gguf.text("tokenizer.ggml.pre", ""))
    if cut is None:
        raise _refused(
            gguf, f"it cuts text in the way {name!r}, which is not among {', '.join(CUTS)}"
        )
    tokens = _tokens(gguf)
    tokenizer = _byte_level_bpe(gguf, tokens, cut)
    tokenizer.add_special_tokens(_kept_whole(gguf, tokens, _CONTROL))
    tokenizer.add_tokens(_kept_whole(gguf, tokens, _USER_DEFINED))
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
    if len(set(tokens)) != len(tokens):
        raise _refused(gguf, "a token comes twice in its vocabulary")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] < len(tokens):
        raise _refused(
            gguf, f"it has {len(tokens)} tokens and the model's embedding only {embedding.shape[0]}"
        )
    return tokens


def _byte_level_bpe(gguf: GGUFFile, tokens: list[str], cut: Cut) -> Tokenizer:
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
    tokenizer.post_processor = _post_processor(gguf, tokens)
    return tokenizer


def _post_processor(gguf: GGUFFile, tokens: list[str]) -> processors.PostProcessor:
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
        return processors.ByteLevel(trim_offsets=False)
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


def _kept_whole(gguf: GGUFFile, tokens: list[str], kind: int) -> list[AddedToken]:
    kinds = gguf.items("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise _refused(gguf, f"it has {len(tokens)} tokens and {len(kinds)} token types")
    special = kind == _CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
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
