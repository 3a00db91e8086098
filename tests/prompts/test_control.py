"""Control tokens that a text spells out, cut into letters by every kind of tokenizer."""

from __future__ import annotations

import copy

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_specstream.prompts import Prompt, encode_prompt
from mlx_specstream.prompts.control import ControlTokens
from tests.support import tiny

TEMPLATE = tiny.CHAT_TEMPLATE + "{# </call> #}"
LETTERS = "▁ <>|/abcdefghijklmnopqrstuvwxyz."


def with_tokens(fast: PreTrainedTokenizerFast, template: str = TEMPLATE) -> TokenizerWrapper:
    fast.add_tokens([AddedToken("<eos>", special=True, normalized=False)], special_tokens=True)
    plain = ("</call>", "<h1>", "  ", "word")
    fast.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    fast.chat_template = template
    return TokenizerWrapper(fast)


def sentencepiece(byte_fallback: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a blank in front of a text and knows few letters."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    vocabulary = {piece: place for place, piece in enumerate(["<unk>", *pieces, *LETTERS, "▁a"])}
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=byte_fallback,
            fuse_unk=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.ByteFallback(), decoders.Fuse()] if byte_fallback else []
    backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="never"), *parts])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


KINDS = {
    "bytes": with_tokens(copy.deepcopy(tiny.hf_byte_tokenizer())),
    "byte fallback": with_tokens(sentencepiece(True)),
    "unknown letters": with_tokens(sentencepiece(False)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    ["<eos>", "a <eos> b", "</call>", "<eos><eos>", "<<eos>>", "<e<eos>os>", "<eos", "a</call"],
)
def test_what_a_user_spells_out_is_letters(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    control = ControlTokens(tokenizer)
    assert control.all >= {"<eos>", "</call>"}
    assert not control.all & {"<h1>", "  ", "word"}
    ids = control.encode(f"a.{control.broken(text)}.<eos>", add_special_tokens=False)
    added = tokenizer._tokenizer.added_tokens_decoder
    assert [added[token].content for token in ids if token in added] == ["<eos>"]
    assert tokenizer.decode(ids).lstrip(" ▁") == f"a.{text}.<eos>"


def test_a_tokenizer_that_does_not_say_where_tokens_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TokenizerWrapper(copy.deepcopy(tiny.hf_byte_tokenizer()))
    control = ControlTokens(tokenizer)
    expected = control.encode(control.broken("a<eos>b"))
    monkeypatch.setattr(type(tokenizer._tokenizer), "is_fast", False)
    assert control.encode(control.broken("a<eos>b")) == expected == list(b"a<eos>b")


def test_prompts_are_read_the_same_way() -> None:
    tokenizer = tiny.byte_tokenizer()
    prompt = Prompt.user("a<eos><system>b", "<pad>")
    ids = encode_prompt(tokenizer, prompt, response="<pad>")
    head = [tiny.SYSTEM, tiny.PAD, tiny.EOS, tiny.USER]
    assert ids == [*head, *b"a<eos><system>b", tiny.EOS, tiny.ASSISTANT, tiny.PAD]
    bare = encode_prompt(tokenizer, Prompt.user("a<eos>"), use_template=False)
    assert bare == [ord("a"), tiny.EOS]
    answered = Prompt(({"role": "assistant", "content": "<eos>"}, {"role": "user", "content": ""}))
    assert encode_prompt(tokenizer, Prompt(answered.messages[:1]), unfinished=True)[-5:] == [
        *b"<eos>"
    ]
