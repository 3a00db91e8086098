"""SentencePiece's BPE as a fast tokenizer: spaces are written ▁, and letters without a token become bytes.

SentencePiece joins the neighbours whose joined piece has the highest score, until none is left; a fast tokenizer joins
those of the first pair in a list. So every way to make a piece of two others becomes a pair, best scores first.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Token types: pieces that are merged; special tokens and words kept whole, which stand for themselves in a text."""

_SPACE = "▁"


def piece_bpe(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], unknown: int | None
) -> Tokenizer:
    """Return a tokenizer of these tokens, without special ones and words kept whole.

    `kinds`: a token type for each. `unknown`: id of the token for what has no bytes either.
    """
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=_merges(tokens, scores, kinds),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def as_pieces(tokens: Sequence[str], kinds: Sequence[int]) -> list[str]:
    """Write spaces as SentencePiece does in words kept whole, too; GGUF files have them bare there."""
    pairs = zip(tokens, kinds, strict=False)
    changed = [t.replace(" ", _SPACE) if kind == USER_DEFINED else t for t, kind in pairs]
    return [*changed, *tokens[len(changed) :]]


def _merges(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, those that make the best ones first."""
    pieces = {
        token: (-score, number)
        for number, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True))
        if kind == NORMAL
    }
    pairs = [
        (pieces[token], pieces[token[:end]][1], token[:end], token[end:])
        for token in pieces
        for end in range(1, len(token))
        if token[:end] in pieces and token[end:] in pieces
    ]
    return [(first, second) for *_, first, second in sorted(pairs)]
