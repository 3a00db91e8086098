"""Tokenizers: files are copied as they are; a lone SentencePiece model is made into a fast one.

`tokenizer.json` loads everywhere without SentencePiece. Two kinds exist: BPE (Llama 2, Mistral),
whose merges are found again from the pieces' scores, and unigram (T5's and others' kind).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .reader import Checkpoint, read_json

_SPACE = "\u2581"
_BPE, _UNIGRAM = 2, 1
MAX_MODEL_BYTES = 256 << 20
MAX_PIECE = 1024
"""Letters of a piece that are looked at; SentencePiece's own limit is far below."""


def tokenizer_files(base: Checkpoint) -> dict[str, Path | str]:
    """Return name -> file to copy or text to write, so that the result has a fast tokenizer.

    Raises:
        CheckpointError: a SentencePiece model is damaged.
    """
    files = dict(base.files)
    model = files.get("tokenizer.model")
    if isinstance(model, Path) and "tokenizer.json" not in files:
        files["tokenizer.json"] = fast_tokenizer(model)
        config = files.get("tokenizer_config.json")
        files["tokenizer_config.json"] = _fast_config(config if isinstance(config, Path) else None)
    return files


def fast_tokenizer(model: Path) -> str:
    """Return the text of a `tokenizer.json` that cuts text as a SentencePiece model does.

    Raises:
        CheckpointError: the file is damaged or of another kind than BPE and unigram.
    """
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    damaged = CheckpointError(f"{model} is not a SentencePiece model; get the file again.")
    if model.stat().st_size > MAX_MODEL_BYTES:
        raise damaged
    kind, add_prefix = _trainer_kind(model.read_bytes(), damaged)
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.Load(str(model))
    except (RuntimeError, OSError, TypeError):
        raise damaged from None
    scored = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    unknown = pieces.unk_id()
    if kind == _UNIGRAM:
        inner: Any = models.Unigram(scored, unk_id=unknown, byte_fallback=_has_bytes(scored))
    else:
        vocabulary = {piece: index for index, (piece, _) in enumerate(scored)}
        inner = models.BPE(
            vocabulary,
            list(_merges(scored, vocabulary)),
            unk_token=scored[unknown][0],
            fuse_unk=True,
            byte_fallback=_has_bytes(scored),
        )
    tokenizer = Tokenizer(inner)
    prefix = [normalizers.Prepend(_SPACE)] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [scored[i][0] for i in range(len(scored)) if pieces.is_control(i) or i == unknown]
    tokenizer.add_special_tokens(special)
    if (bos := pieces.bos_id()) >= 0:
        start = scored[bos][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[start, "$A"], pair=[start, "$A", start, "$B"], special_tokens=[(start, bos)]
        )
    return str(tokenizer.to_str())


def _has_bytes(scored: list[tuple[str, float]]) -> bool:
    return any(piece == "<0x00>" for piece, _ in scored)


def _merges(
    scored: list[tuple[str, float]], vocabulary: dict[str, int]
) -> Iterator[tuple[str, str]]:
    """Yield the merges of a BPE model, best first: every way to cut a piece into two pieces.

    SentencePiece joins whatever pair makes the piece of highest score; a merge list ordered by the
    made piece's score says the same.
    """
    cuts = []
    for index, (piece, score) in enumerate(scored):
        for at in range(1, min(len(piece), MAX_PIECE)):
            left, right = vocabulary.get(piece[:at]), vocabulary.get(piece[at:])
            if left is not None and right is not None:
                cuts.append((-score, index, left, right))
    for _, _, left, right in sorted(cuts):
        yield scored[left][0], scored[right][0]


def _trainer_kind(data: bytes, damaged: CheckpointError) -> tuple[int, bool]:
    """Return model_type of the trainer spec (field 2.3) and add_dummy_prefix (field 3.3)."""
    kind, prefix = _UNIGRAM, True
    try:
        for number, value in _fields(data):
            if number == 2 and isinstance(value, bytes):
                kind = next(
                    (int(v) for n, v in _fields(value) if n == 3 and isinstance(v, int)), kind
                )
            if number == 3 and isinstance(value, bytes):
                found = [v for n, v in _fields(value) if n == 3 and isinstance(v, int)]
                prefix = bool(found[-1]) if found else prefix
    except (IndexError, ValueError):
        raise damaged from None
    if kind not in (_BPE, _UNIGRAM):
        raise CheckpointError(f"{damaged.args[0].split(' is not ')[0]} is neither BPE nor unigram.")
    return kind, prefix


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a protobuf message: (number, integer or bytes)."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
        else:
            sizes = {1: 8, 5: 4}
            if tag & 7 == 2:
                size, position = _varint(data, position)
            else:
                size = sizes[tag & 7] if tag & 7 in sizes else len(data) + 1
            if position + size > len(data):
                raise ValueError("a field leaves the message")
            yield tag >> 3, data[position : position + size]
            position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("a number is too long")


def _fast_config(path: Path | None) -> str:
    """Return a tokenizer_config.json that names the fast class and keeps what was there."""
    fields = (read_json(path) or {}) if path else {}
    return json.dumps({**fields, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"
