"""What is trained on begins with the tokens that decoding sees, whatever the template does with thoughts."""

from __future__ import annotations

import copy

import pytest
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper

from mlx_specstream.errors import DataError
from mlx_specstream.prompts import Prompt, encode_prompt
from mlx_specstream.train.data import Record, record_tokens, tokenize
from tests.support.tiny import ASSISTANT, EOS, USER, hf_byte_tokenizer

TURNS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}THOUGHT{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>OPENING{% endif %}"
)
OLD_THOUGHT = "{% if loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
ASKED = [{"role": "user", "content": "hi"}]
OPEN = "<think>\n"
EMPTY = "<channel|>"


def tokenizer_of(thought: str, opening: str) -> TokenizerWrapper:
    """Return the byte tokenizer, which merges two line feeds, with a template of thoughts."""
    core = copy.deepcopy(hf_byte_tokenizer())
    core.add_tokens(["\n\n", "<think>", "</think>", "<|channel>", "<channel|>"])
    core.chat_template = TURNS.replace("THOUGHT", thought).replace("OPENING", opening)
    return TokenizerWrapper(core, BPEStreamingDetokenizer)


@pytest.mark.parametrize(
    ("thought", "opening", "turn", "expected"),
    [
        ("", "", {"content": "yes"}, "yes<eos>"),
        # Qwen3 renders an empty thought where the model is to open it itself ...
        ("<think>\n\n</think>\n\n", "", {"content": "yes"}, "<think>\n\n</think>\n\nyes<eos>"),
        # ... or opens it, and then its first line feed is one token with what follows.
        (OLD_THOUGHT, OPEN, {"content": "yes"}, "\n</think>\n\nyes<eos>"),
        (
            OLD_THOUGHT,
            OPEN,
            {"content": "yes", "reasoning_content": "so"},
            "so\n</think>\n\nyes<eos>",
        ),
        # DeepSeek's kind opens a thought and renders none.
        ("", OPEN, {"content": "yes"}, "\n</think>\n\nyes<eos>"),
        ("", OPEN, {"content": "yes", "reasoning": "so"}, "so\n</think>\n\nyes<eos>"),
        ("", OPEN, {"content": "<think>\nso\n</think>\nyes"}, "so\n</think>\n\n\nyes<eos>"),
        # Gemma 4's kind appends an empty thought and renders none.
        ("", f"<|channel>thought\n{EMPTY}", {"content": "yes"}, "yes<eos>"),
        ("", f"<|channel>thought\n{EMPTY}", {"content": "<|chan"}, "<|chan<eos>"),
        # The thought that its content holds is not what an empty one was opened for.
        (
            "{{ m.content.split('</think>')[0] if '</think>' in m.content else '<think>' }}</think>",
            "<think></think>",
            {"content": "<think>so</think>yes"},
            "yes<eos>",
        ),
        (
            OLD_THOUGHT,
            "<think>\n\n</think>\n\n",
            {"content": "yes", "reasoning_content": "so"},
            "yes<eos>",
        ),
    ],
)
def test_training_begins_where_decoding_does(thought, opening, turn, expected) -> None:
    tokenizer = tokenizer_of(thought, opening)
    record = Record({"messages": [*ASKED, {"role": "assistant", **turn}]}, "here")
    tokens, prompt_length = record_tokens(record, tokenizer)
    seen = encode_prompt(tokenizer, Prompt.user("hi"))
    assert tokens[:prompt_length] == seen
    assert tokenizer.decode(tokens[prompt_length:]) == expected
    assert record_tokens(record, tokenizer, mask_prompt=False) == (tokens, 0)
    if set(turn) == {"content"} and "<" not in turn["content"]:
        fields = {"prompt": "hi", "completion": "yes"}
        assert record_tokens(Record(fields, "here"), tokenizer) == (tokens, prompt_length)


def test_a_users_last_turn_is_not_trained_on(byte_tokenizer) -> None:
    asked = [*ASKED, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
    found = record_tokens(Record({"messages": asked}, "here"), byte_tokenizer)
    assert found == ([USER, *b"hi", EOS, ASSISTANT, *b"yes", EOS], 5)
    unanswered = Record({"messages": ASKED}, "there")
    examples, report = tokenize(
        [Record({"messages": asked}, "here"), unanswered], byte_tokenizer, max_length=50
    )
    assert [example.where for example in examples] == ["here"]
    assert report.no_completion == 1
    with pytest.raises(DataError, match="records that end with an answer"):
        tokenize([unanswered], byte_tokenizer, max_length=50)


def test_a_template_that_hides_the_answer_is_refused() -> None:
    tokenizer = tokenizer_of("", OPEN)
    tokenizer._tokenizer.chat_template = (
        "{{ messages[0].content }}{{ 'x' if add_generation_prompt }}"
    )
    record = Record({"messages": [*ASKED, {"role": "assistant", "content": "yes"}]}, "line 7")
    with pytest.raises(DataError, match="line 7 cannot be turned into tokens: it does not show"):
        record_tokens(record, tokenizer)
