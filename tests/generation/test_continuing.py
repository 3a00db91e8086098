"""The blank an answer begins with, which belongs to a text that goes on and not to a new one."""

from __future__ import annotations

from functools import partial

import pytest
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_specstream import batch_generate, generate, load, stream_generate
from mlx_specstream.commands.generate import main
from mlx_specstream.generation.text import TextAssembler, continues_text, detokenizer_for
from tests.apps.parrot import save_parrot
from tests.support import tiny

ANSWER = " is blue, 你好."


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer whose words carry their blank in front, as Llama 2's."""
    words = ["<unk>", "▁a", "▁is", "▁blue", "a", "▁", "<eos>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


SPM = sentencepiece()
BYTES = tiny.hf_byte_tokenizer()


@pytest.mark.parametrize(
    ("wrapped", "tokens"),
    [
        (TokenizerWrapper(BYTES, BPEStreamingDetokenizer), list(b" is blue")),
        (TokenizerWrapper(BYTES, NaiveStreamingDetokenizer), list(b" is blue")),
        (TokenizerWrapper(SPM, SPMStreamingDetokenizer), [2, 3]),
        (TokenizerWrapper(SPM, partial(SPMStreamingDetokenizer, trim_space=False)), [2, 3]),
        (TokenizerWrapper(SPM, NaiveStreamingDetokenizer), [2, 3]),
    ],
)
def test_every_kind_of_detokenizer_keeps_it(wrapped: TokenizerWrapper, tokens: list[int]) -> None:
    answer = TextAssembler(detokenizer_for(wrapped, continues=True), (), max_tokens=len(tokens))
    pieces = answer.take(tokens, [0] * len(tokens))
    assert "".join(piece.text for piece in pieces) == " is blue"


def test_ids_and_control_tokens_begin_a_new_text() -> None:
    wrapped = tiny.byte_tokenizer()
    for prompt, expected in (("sky", True), ("a<assistant>", False), (list(b"sky"), False)):
        ids = list(wrapped.encode(prompt)) if isinstance(prompt, str) else prompt
        assert continues_text(wrapped, prompt, ids) is expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A parrot that answers `<user>` and `<assistant>` with a blank first."""
    return str(save_parrot(tmp_path_factory.mktemp("models") / "blank", ANSWER))


def test_a_text_goes_on_and_a_turn_begins(folder: str) -> None:
    model, tokenizer = load(folder)
    prompt = "sky<assistant>"
    assert generate(model, tokenizer, prompt) == ANSWER[1:]
    for continues, expected in ((True, ANSWER), (False, ANSWER[1:])):
        found = stream_generate(model, tokenizer, prompt, continues=continues)
        assert "".join(one.text for one in found) == expected
    (turn,) = batch_generate(model, tokenizer, [prompt]).answers
    assert turn.text == ANSWER[1:]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ANSWER[1:]),
        (["--ignore-chat-template"], ANSWER),
        (["--prefill-response", "<assistant>"], ANSWER),
    ],
)
def test_generate_keeps_it_where_a_text_goes_on(
    folder: str, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "sky<assistant>" if "--ignore-chat-template" in options else "sky"
    assert main(["--model", folder, "--prompt", prompt, "--verbose", "F", *options]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
