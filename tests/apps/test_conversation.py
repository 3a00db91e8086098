from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream.apps.conversation import FULL_TO, Conversation, Message
from mlx_specstream.errors import DataError, OptionError


def encode(messages: object) -> list[int]:
    """One token per character, and one before every message."""
    assert isinstance(messages, list)
    return [n for message in messages for n in [0, *message["content"].encode()]]


def talk(*questions: str, system: str | None = None) -> Conversation:
    conversation = Conversation(system)
    for question in questions:
        conversation.ask(question)
        conversation.answer(question.upper())
    return conversation


def test_messages_are_what_chat_templates_take() -> None:
    conversation = talk("a", system="be kind")
    conversation.ask("b")
    assert conversation.messages() == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "b"},
    ]


def test_editing_drops_what_came_after() -> None:
    conversation = talk("a", "b", "c")
    conversation.edit(2, "x")
    assert [e.question for e in conversation.exchanges] == ["a", "x"]
    assert conversation.waiting


def test_retrying_drops_the_last_answer_alone() -> None:
    conversation = talk("a", "b")
    conversation.retry()
    assert conversation.waiting
    assert [e.answer for e in conversation.exchanges] == ["A", None]


def test_a_copy_changes_on_its_own() -> None:
    conversation = talk("a")
    conversation.copy().ask("b")
    assert len(conversation.exchanges) == 1


def test_wrong_numbers_and_empty_questions_are_refused() -> None:
    conversation = talk("a")
    for number in (0, 2, -1):
        with pytest.raises(OptionError, match="the questions are 1 to 1"):
            conversation.edit(number, "x")
    with pytest.raises(DataError, match="nothing was changed"):
        conversation.edit(1, "  ")
    with pytest.raises(DataError, match="empty"):
        conversation.ask("\n")
    with pytest.raises(OptionError, match="ask something first"):
        Conversation().retry()
    with pytest.raises(OptionError, match="none yet"):
        Conversation().question(1)
    assert conversation == talk("a")


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full() -> None:
    conversation = talk(*("x" * 9 for _ in range(5)), system="system")
    conversation.ask("newest")
    assert len(encode(conversation.messages())) == 114
    ids = conversation.prompt(encode, context_length=120, max_tokens=-1)
    assert conversation.forgotten == 3
    assert len(ids) + 30 <= 120 * FULL_TO
    seen: list[Message] = conversation.messages()
    assert seen[0]["content"] == "system"
    assert seen[-1]["content"] == "newest"
    assert len(conversation.exchanges) == 6, "nothing is removed"


def test_a_question_that_is_too_long_alone_is_refused() -> None:
    conversation = talk("a", "b")
    conversation.ask("x" * 200)
    with pytest.raises(DataError, match=r"201 tokens .* holds 100"):
        conversation.prompt(encode, context_length=100, max_tokens=10)
    assert conversation.forgotten == 0


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    context=st.integers(70, 300),
    max_tokens=st.sampled_from([-1, 1, 16, 1000]),
    edits=st.lists(st.integers(1, 12), max_size=3),
)
def test_there_is_always_room_for_an_answer(
    lengths: list[int], context: int, max_tokens: int, edits: list[int]
) -> None:
    conversation = Conversation()
    for number, length in enumerate(lengths):
        conversation.ask("q" * length)
        if number in edits:
            conversation.edit(max(1, number // 2), "edited")
        before = conversation.forgotten
        ids = conversation.prompt(encode, context, max_tokens)
        assert len(ids) < context
        assert ids == encode(conversation.messages())
        assert 0 <= conversation.forgotten < len(conversation.exchanges)
        assert conversation.forgotten >= before
        conversation.answer("a" * (length // 2))
