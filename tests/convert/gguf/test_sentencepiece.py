"""SentencePiece's BPE rebuilt: against its rule, spelled out, and against the library where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mlx_specstream.convert.gguf import open_gguf
from mlx_specstream.convert.gguf.tokenizer import build_tokenizer
from mlx_specstream.errors import CheckpointError
from tests.convert.gguf import made

TEXTS = st.text(st.sampled_from("aaabbcd efgh  \n<>zä▁"), max_size=30)
NUMBERS = {token.replace(" ", "▁"): n for n, (token, _, _) in enumerate(made.PIECES)}
SCORES = {token: score for token, kind, score in made.PIECES if kind == 1}
WHOLE = sorted((t.replace(" ", "▁") for t, kind, _ in made.PIECES if kind == 4), key=len)[::-1]


def tokenizer_of(path: Path, **changes: made.Typed) -> Tokenizer:
    words = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    path.write_bytes(made.gguf_bytes(made.gemma_metadata() | words, {}))
    return build_tokenizer(open_gguf(path))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("pieces") / "x.gguf")


def reference(text: str) -> list[int]:
    """Cut out what is kept whole, longest first; elsewhere join the best-scored neighbours, leftmost first."""
    text = text.replace(" ", "▁")
    ids: list[int] = []
    symbols: list[str] = []
    at = 0
    while at < len(text):
        whole = next((w for w in WHOLE if text.startswith(w, at)), None)
        if whole is None:
            symbols.append(text[at])
        else:
            ids += [*merged(symbols), NUMBERS[whole]]
            symbols = []
        at += len(whole or "x")
    return ids + merged(symbols)


def merged(symbols: list[str]) -> list[int]:
    symbols = list(symbols)
    while True:
        places = [
            (-SCORES[symbols[n] + symbols[n + 1]], n)
            for n in range(len(symbols) - 1)
            if symbols[n] + symbols[n + 1] in SCORES
        ]
        if not places:
            break
        _, n = min(places)
        symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
    return [number for symbol in symbols for number in numbers(symbol)]


def numbers(symbol: str) -> list[int]:
    if symbol in NUMBERS:
        return [NUMBERS[symbol]]
    return [NUMBERS[f"<0x{byte:02X}>"] for byte in symbol.encode()]


@given(text=TEXTS)
def test_the_rule(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text, add_special_tokens=False).ids == reference(text)


@given(text=TEXTS)
def test_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("ab<eos>").tokens == ["<bos>", "ab", "<eos>"]
    assert tokenizer.decode([2, NUMBERS["ab"], 1]) == "ab"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"add_space_prefix": made.flag(True)}, "puts a space before"),
        ({"scores": made.Typed(9, [0.0], 6)}, "512 tokens, 1 scores"),
        ({"token_type": made.i32s([1])}, "1 token types"),
        ({"unknown_token_id": made.u32(999)}, "unknown_token_id is 999"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, made.Typed], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        tokenizer_of(tmp_path / "x.gguf", **changes)


@given(text=TEXTS)
def test_the_library_agrees(tokenizer: Tokenizer, library, text: str) -> None:
    found = tokenizer.encode(text, add_special_tokens=False).ids
    assert found == library.EncodeAsIds(text)


@pytest.fixture(scope="module")
def library():
    """SentencePiece itself, with the same pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    protocol = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = protocol.ModelProto()
    for token, kind, score in made.PIECES:
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = token.replace(" ", "▁"), score, kind
    model.pieces[3].type = 2
    trainer, rules = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback = 2, True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 3, 2, 1, 0
    rules.name, rules.escape_whitespaces = "identity", True
    rules.add_dummy_prefix = rules.remove_extra_whitespaces = False
    result = sentencepiece.SentencePieceProcessor()
    result.LoadFromSerializedProto(model.SerializeToString())
    return result
