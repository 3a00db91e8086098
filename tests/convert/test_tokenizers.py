"""A SentencePiece model becomes a fast tokenizer that cuts text in the same way."""

import io
import json

import pytest

from mlx_specstream.convert.reader import Checkpoint
from mlx_specstream.convert.tokenizers import fast_tokenizer, tokenizer_files
from mlx_specstream.errors import CheckpointError

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

TEXT = """the cat sat on the mat while the dog ran around the old red house
a small bird sang in the morning light and the children played near the river
numbers like 12 and 345 and signs such as + - * / belong to the text as well
she sells sea shells on the sea shore; the shells she sells are sea shells"""
PROBES = [
    "the cat sat", " leading space", "two  spaces", "tabs\tand\nlines", "unseen: ÄÖÜ 漢字 🙂", "",
    "345 + 12", "shells", "trailing ",
]  # fmt: skip


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request, tmp_path_factory):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 4),
        model_writer=out,
        model_type=request.param,
        vocab_size=360,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return path


def test_ids_and_texts_are_the_same(model):
    slow = sentencepiece.SentencePieceProcessor(model_file=str(model))
    fast = tokenizers.Tokenizer.from_str(fast_tokenizer(model))
    for text in [*PROBES, *TEXT.splitlines()]:
        ids = slow.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids, text
        assert fast.decode(ids) == slow.decode(ids)
    assert fast.encode("the").ids[0] == slow.bos_id()


def test_files_say_that_the_tokenizer_is_fast(model, tmp_path):
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}))
    found = {"tokenizer.model": model, "tokenizer_config.json": config}
    files = tokenizer_files(Checkpoint(tmp_path, {}, {}, files=found))
    fields = json.loads(files["tokenizer_config.json"])
    assert fields == {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    assert json.loads(files["tokenizer.json"])["model"]
    for name, content in files.items():
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded.encode("the cat"), skip_special_tokens=True) == "the cat"


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 40, b"\xff" * 40, b"\x12\x03\x18\x03", b"\x0a\x7f"]
)
def test_damaged_models_are_one_sentence(tmp_path, data):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        fast_tokenizer(path)
