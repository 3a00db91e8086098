"""Text is decoded by what the vocabulary is, and a folder that lacks a part says which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_specstream import load
from mlx_specstream.errors import ModelError
from mlx_specstream.loading.tokenizer import decode_by_vocabulary, spelling_in
from tests.support import tiny
from tests.support.tokenizers import KINDS
from tests.support.tokenizers import TEXT as INDENTED

SENTENCEPIECE = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
DECODERS = {
    "sentencepiece": {"type": "Sequence", "decoders": [*SENTENCEPIECE, STRIP]},
    "sentencepiece, blank kept": {"type": "Sequence", "decoders": SENTENCEPIECE},
    "one that mlx-lm does not know": {"type": "Fuse"},
    "none": None,
}
TEXT = "Où est l'œuf ?\n  Là.\tEnd"


def streamed(tokenizer: TokenizerWrapper, text: str) -> str:
    detokenizer = tokenizer.detokenizer
    for token in tokenizer.encode(text, add_special_tokens=False):
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text)


@pytest.mark.parametrize("decoder", DECODERS)
def test_bytes_are_decoded_as_bytes_whatever_the_decoder(tmp_path: Path, decoder: str) -> None:
    folder = tiny.save_tiny_model(tmp_path / "model")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "decoder": DECODERS[decoder]}))
    _, tokenizer = load(str(folder), streams=None)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(ids) == TEXT
    assert streamed(tokenizer, TEXT) == TEXT
    assert tokenizer.eos_token_ids == {tiny.EOS}
    assert tokenizer.has_chat_template


def test_a_vocabulary_is_judged_by_how_most_tokens_begin() -> None:
    assert spelling_in({"Ġ": 0, "Ġa": 1, "b": 2}) == "bytes"
    assert spelling_in({"▁": 0, "▁a": 1, "Ġ": 2, "b": 3}) == "sentencepiece"
    assert spelling_in({"a": 0, "b": 1}) == "other"
    assert spelling_in({"a": 0, "##b": 1, "▁": 2}) == "other"


@pytest.mark.parametrize("kind", [*KINDS, "WordPiece"])
def test_text_in_pieces_is_the_text_at_once(kind: str) -> None:
    """Behind a line break too, where a line's indent is not a text's first blank."""
    made, text = (
        (word_pieces, "hello old world") if kind == "WordPiece" else (KINDS[kind][0], INDENTED)
    )
    tokenizer = decode_by_vocabulary(TokenizerWrapper(made()))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, text) == tokenizer.decode(ids) == text
    detokenizer, seen = tokenizer.detokenizer, ""
    for token in ids:
        detokenizer.add_token(token)
        seen += detokenizer.last_segment
        assert text.startswith(seen)
    detokenizer.finalize()
    assert seen + detokenizer.last_segment == text


def word_pieces() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "hello", "wo", "##r", "##ld", "old"]
    model = models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def refused(folder: Path | str, *words: str, adapter_path: str | None = None) -> None:
    with pytest.raises(ModelError) as caught:
        load(str(folder), streams=None, adapter_path=adapter_path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    for word in words:
        assert word in text


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    folder = tiny.save_tiny_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    refused(folder, f"{folder} holds no tokenizer", "tokenizer.json")


def test_adapters_that_are_not_there(tmp_path: Path) -> None:
    folder = tiny.save_tiny_model(tmp_path / "model")
    adapter = tmp_path / "adapter"
    refused(folder, f"the adapter folder {adapter} does not exist", adapter_path=str(adapter))
    adapter.mkdir()
    refused(folder, "holds no adapter_config.json", adapter_path=str(adapter))
    (adapter / "streams.safetensors").touch()
    refused(folder, "it holds streams", adapter_path=str(adapter))
    (adapter / "adapter_config.json").write_text("{}")
    refused(folder, "holds no adapters.safetensors", adapter_path=str(adapter))
    (adapter / "adapters.safetensors").touch()
    refused(folder, f"with the adapters {adapter} cannot be loaded", adapter_path=str(adapter))
    file = folder / "config.json"
    refused(folder, "is a file, not a folder", adapter_path=str(file))


@pytest.mark.parametrize(
    "path", ["./nothing", "../nothing", "~/no/thing", "/nothing", "/no/thing", "no/such/thing"]
)
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(path: str) -> None:
    refused(path, f"the path {path} does not exist", "owner/name")
