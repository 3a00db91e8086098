"""The rebuilt tokenizer: cuts, specials, ends, and the tables it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream.convert.gguf import open_gguf
from mlx_specstream.convert.gguf.tokenizer import CUTS, build_tokenizer, token_ids, tokenizer_files
from mlx_specstream.errors import CheckpointError
from tests.convert.gguf import made
from tests.support import tiny


def tokenizer_of(tmp_path: Path, **changes: made.Typed):
    metadata = made.tiny_metadata("llama")
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    path = tmp_path / "x.gguf"
    path.write_bytes(made.gguf_bytes(metadata, {}))
    return build_tokenizer(open_gguf(path))


def pieces(cut: str, text: str) -> list[str]:
    """How a text is cut, in readable letters."""
    letters = dict(zip(tiny.byte_letters(), range(256), strict=True))
    found = CUTS[cut].pieces().pre_tokenize_str(text)
    return [bytes(letters[letter] for letter in piece).decode() for piece, _ in found]


def reference_gpt2(text: str) -> list[str]:
    """The GPT-2 pattern for plain ASCII."""
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
    return re.findall(pattern, text)


def reference_digits(text: str) -> list[str]:
    """Digits one by one, GPT-2 between them."""
    return [
        piece
        for part in re.findall(r"[0-9]|[^0-9]+", text)
        for piece in ([part] if part.isdigit() else reference_gpt2(part))
    ]


def reference_words(digits: str):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|"
        + digits
        + r"| ?[^\sA-Za-z0-9]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda text: re.findall(pattern, text)


REFERENCES = {
    "gpt-2": reference_gpt2,
    "smollm": reference_digits,
    "starcoder": reference_digits,
    "llama-bpe": reference_words("[0-9]{1,3}"),
    "qwen2": reference_words("[0-9]"),
}
ASCII = st.text(st.sampled_from("aBz09 12\t\n\r.,'s!_<()"), max_size=30)


@pytest.mark.parametrize("cut", REFERENCES)
@given(text=ASCII)
def test_cuts_of_plain_text(cut: str, text: str) -> None:
    assert pieces(cut, text) == REFERENCES[cut](text)


@pytest.mark.parametrize(
    ("cut", "text", "expected"),
    [
        ("smollm", "\n\n12 é٣", ["\n\n", "1", "2", " é", "٣"]),
        ("gpt-2", "\n\n12 é", ["\n", "\n", "12", " é"]),
        ("llama-bpe", "1234 it'S", ["123", "4", " it", "'S"]),
        ("qwen2", "1234 über", ["1", "2", "3", "4", " über"]),
    ],
)
def test_cuts_by_hand(cut: str, text: str, expected: list[str]) -> None:
    assert pieces(cut, text) == expected


def test_merges_and_specials(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.encode(" the<end> t").tokens == ["Ġthe", "<end>", "Ġt"]
    assert tokenizer.encode("<end>").ids == [255]
    assert tokenizer.decode([253, 255, 251], skip_special_tokens=True) == " the t"


@given(text=st.text(max_size=40))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    tokenizer = ROUND_TRIP.setdefault("it", tokenizer_of(tmp_path_factory.mktemp("t")))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


ROUND_TRIP: dict = {}


@pytest.mark.parametrize("ends", [(False, False), (True, False), (False, True), (True, True)])
def test_first_and_last_token(tmp_path: Path, ends: tuple[bool, bool]) -> None:
    tokenizer = tokenizer_of(
        tmp_path, add_bos_token=made.flag(ends[0]), add_eos_token=made.flag(ends[1])
    )
    first, last = [254] * ends[0], [255] * ends[1]
    assert tokenizer.encode("t").ids == [*first, ord("t"), *last]
    assert tokenizer.encode("t", add_special_tokens=False).ids == [ord("t")]
    assert tokenizer.encode("t", "h").ids == [*first, ord("t"), *last, *first, ord("h"), *last]


def test_words_kept_whole(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, token_type=made.i32s([1] * 250 + [4] + [1] * 3 + [3, 3]))
    letter = tiny.byte_letters()[250]
    assert tokenizer.encode(f"t{letter}t").ids == [ord("t"), 250, ord("t")]
    assert not tokenizer.get_added_tokens_decoder()[250].special


def test_ids_for_the_config(tmp_path: Path) -> None:
    path = made.write_tiny_gguf(tmp_path / "x.gguf")
    assert token_ids(open_gguf(path)) == {"bos_token_id": 254, "eos_token_id": 255}


def test_files_are_text(tmp_path: Path) -> None:
    files = tokenizer_files(open_gguf(made.write_tiny_gguf(tmp_path / "x.gguf")))
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert "<end>" in files["chat_template.jinja"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": made.text("bert")}, "of the kind 'bert'"),
        ({"pre": made.text("tekken")}, "'tekken'"),
        ({"tokens": made.texts(["a", "a"])}, "comes twice"),
        ({"tokens": made.i32s([1, 2])}, "list of str"),
        ({"merges": made.texts(["a b c"])}, "'a b c'"),
        ({"merges": made.texts(["a"])}, "'a'"),
        ({"merges": made.texts(["t q"])}, "'t q'"),
        ({"token_type": made.i32s([1, 2])}, "2 token types"),
        ({"eos_token_id": made.u32(256)}, "eos_token_id is 256"),
        ({"bos_token_id": made.text("x")}, "should be a whole number"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, made.Typed], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        tokenizer_of(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(
        made.gguf_bytes(
            made.tiny_metadata("llama"),
            {"token_embd.weight": made.Stored(0, (255, 4), bytes(255 * 16))},
        )
    )
    with pytest.raises(CheckpointError, match="256 tokens and the model's embedding only 255"):
        build_tokenizer(open_gguf(path))
