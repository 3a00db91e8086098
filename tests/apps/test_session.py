"""After anything that can happen to a chat, its KV cache is that of a fresh prefill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream import StreamModel
from mlx_specstream.apps.chat.session import ChatSession
from mlx_specstream.apps.chat.settings import Settings
from mlx_specstream.apps.chat.speed import measure
from mlx_specstream.apps.chat.status import answer_status
from mlx_specstream.apps.conversation import Conversation
from mlx_specstream.config import SamplingConfig
from mlx_specstream.errors import DataError
from mlx_specstream.speculation import drafting
from tests.apps.parrot import ANSWER
from tests.support.engine import examples
from tests.support.scripted import assert_holds, with_streams

TREE = Settings(max_tokens=12).changed("tree", "8")


@pytest.fixture(scope="module")
def model(tiny_llama: nn.Module) -> StreamModel:
    return with_streams(tiny_llama)


def after(count: int) -> Any:
    """Return a `stopped` that is true from the `count`-th time it is asked."""
    asked: Iterator[int] = iter(range(10**6))
    return lambda: next(asked) >= count


def ask(session: ChatSession, question: str, stop_after: int = 10**6) -> str:
    conversation = session.conversation.copy()
    conversation.ask(question)
    return answer(session, conversation, stop_after)


def answer(session: ChatSession, conversation: Conversation, stop_after: int = 10**6) -> str:
    return "".join(r.text for r in session.answer(conversation, after(stop_after)))


def check(session: ChatSession) -> None:
    """The cache knows its tokens, and its rows are theirs."""
    assert session.prefix.kv.length == len(session.prefix.tokens)
    if session.prefix.tokens:
        assert_holds(session.prefix.kv, session.model, session.prefix.tokens)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "retry", "edit", "system", "mode", "error", "clear"]),
        st.integers(0, 14),
        st.text("ab c", min_size=1, max_size=5).map(lambda text: f"{text}?"),
    ),
    min_size=2,
    max_size=7,
)


@examples(25)
@given(ACTIONS)
def test_the_cache_is_a_fresh_prefills(
    model: StreamModel, byte_tokenizer: TokenizerWrapper, actions: list[tuple[str, int, str]]
) -> None:
    session = ChatSession(model, byte_tokenizer, TREE)
    for action, number, text in actions:
        conversation = session.conversation.copy()
        if action == "system":
            session.conversation.system = text
            continue
        if action == "clear":
            conversation.clear()
        elif action == "mode":
            mode = "plain" if session.mode != "plain" else "speculative"
            session.use(session.settings.changed("mode", mode))
        if action in ("retry", "edit") and conversation.exchanges:
            if action == "retry":
                conversation.retry()
            else:
                conversation.edit(1 + number % len(conversation.exchanges), text)
        else:
            conversation.ask(text)
        if action == "error":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(drafting, "committed", _fail)
                if session.mode == "plain":
                    continue
                with pytest.raises(RuntimeError, match="no device"):
                    answer(session, conversation)
        else:
            answer(session, conversation, number)
        check(session)
        assert not session.conversation.waiting


def _fail(*_: object) -> None:
    raise RuntimeError("no device")


def test_typical_acceptance_is_called_lossy(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    session = ChatSession(model, byte_tokenizer, TREE.changed("lossy-typical", "0.09"))
    assert session.mode == "lossy"
    assert "lossy" in answer_status(session, None, None)
    session.use(session.settings.changed("lossy-typical", "none"))
    assert session.mode == "lossless"


def test_thirty_turns_later(model: StreamModel, byte_tokenizer: TokenizerWrapper) -> None:
    session = ChatSession(model, byte_tokenizer, TREE)
    sizes = []
    for turn in range(30):
        ask(session, f"and this is question {turn}", stop_after=turn % 15)
        sizes.append(session.prefix.kv.nbytes)
    check(session)
    assert session.conversation.forgotten > 0, "the context of 512 was full at some point"
    assert len(session.conversation.exchanges) > 20, "but for those stopped before a word"
    assert sizes[-1] <= max(sizes[:20]), "the cache does not grow beyond the context"


def test_only_what_changed_is_computed(
    parrot: tuple[StreamModel, Any],
) -> None:
    model, tokenizer = parrot
    session = ChatSession(model, tokenizer)
    session.conversation.system = "be kind"
    assert ask(session, "fruit?") == ANSWER
    first = session.reply
    assert first is not None
    assert first.prefilled == len(first.prompt)

    # A second question: the first answer is cut into other tokens than were generated, so
    # everything up to it is reused.
    ask(session, "more?")
    second = session.reply
    assert second is not None
    assert second.prefilled == len(second.prompt) - len(first.prompt)

    # Again: nothing but the last prompt token, which decoding starts from.
    conversation = session.conversation.copy()
    conversation.retry()
    answer(session, conversation)
    assert session.reply is not None
    assert session.reply.prefilled == 1

    # A changed ending of the second question: what follows the common beginning.
    conversation = session.conversation.copy()
    conversation.edit(2, "moss?")
    answer(session, conversation)
    assert session.reply.prefilled == len("ss?") + 2  # and <eos><assistant>

    # Another system prompt changes everything behind its first letters.
    session.conversation.system = "be brief"
    ask(session, "x")
    assert session.reply.prefilled == len(session.reply.prompt) - len("_be ")


def test_tokens_that_survive_the_template_are_reused(
    model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    session = ChatSession(model, byte_tokenizer, TREE)
    conversation = Conversation()
    conversation.ask("a")
    for response in session.answer(conversation):
        del response
    assert session.reply is not None
    ids = session.prefix.tokens[:]
    ask(session, "b")
    shared = len(session.reply.prompt) - session.reply.prefilled
    assert session.reply.prompt[:shared] == ids[:shared]


def test_stopping_before_the_first_word_changes_nothing(
    parrot: tuple[StreamModel, Any],
) -> None:
    session = ChatSession(*parrot)
    ask(session, "one")
    before = session.conversation
    long = "a long question, " * 60
    assert ask(session, long, stop_after=0) == ""
    assert session.conversation is before
    conversation = session.conversation.copy()
    conversation.edit(1, long)
    assert answer(session, conversation, stop_after=0) == ""
    assert session.conversation.exchanges[0].answer == ANSWER
    check(session)


def test_a_stopped_answer_is_kept_as_far_as_it_came(parrot: tuple[StreamModel, Any]) -> None:
    session = ChatSession(*parrot)
    text = ask(session, "one", stop_after=9)
    exchange = session.conversation.exchanges[0]
    assert exchange.stopped
    assert exchange.answer == text
    assert ANSWER.startswith(text)
    assert ask(session, "two") == ANSWER
    check(session)


def test_answers_are_those_of_plain_decoding(parrot: tuple[StreamModel, Any]) -> None:
    plain = ChatSession(*parrot, settings=Settings(mode="plain"))
    assert ask(plain, "one") == ANSWER
    assert plain.mode == "plain"
    session = ChatSession(*parrot)
    assert ask(session, "one") == ANSWER
    assert session.mode == "lossless"
    assert session.reply is not None
    assert [o for step in session.reply.steps for o in step.origins][:5] == [0, 1, 0, 1, 0]
    assert all(step.draft is not None for step in session.reply.steps)


def test_a_question_too_long_for_the_context(parrot: tuple[StreamModel, Any]) -> None:
    session = ChatSession(*parrot)
    ask(session, "one")
    with pytest.raises(DataError, match="ask something shorter"):
        ask(session, "x" * 5000)
    assert len(session.conversation.exchanges) == 1
    check(session)


def test_measuring_changes_nothing(parrot: tuple[StreamModel, Any]) -> None:
    session = ChatSession(*parrot, settings=Settings(sampling=SamplingConfig(temp=1.0, seed=5)))
    assert measure(session, 1.0) is None, "there is nothing to measure yet"
    ask(session, "one")
    tokens, state = session.prefix.tokens[:], mx.random.state[0].tolist()
    speed = measure(session, 5.0)
    assert speed is not None
    assert speed.ratio > 0
    assert session.prefix.tokens == tokens
    assert mx.random.state[0].tolist() == state
    check(session)
    assert measure(session, 5.0, lambda: True) is None
