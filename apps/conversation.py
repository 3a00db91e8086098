"""A conversation: questions, their answers, and how much of it the model still sees.

Pure state: no model, no terminal. Exchanges are numbered from 1, as they are shown.

    system prompt │ exchange 1   2   3 │ 4   5   6
                  │ forgotten          │ what the model sees, with the system prompt

When the context is full the oldest exchanges are forgotten, a batch at a time, so that the text
after them is computed anew only once in a while; the system prompt and the newest question stay.
Forgotten exchanges remain in the conversation and in its file; the model alone no longer sees
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..errors import DataError, OptionError

Message = dict[str, str]
Encode = Callable[[Sequence[Message]], list[int]]

FULL_TO = 0.75  # share of the context that is in use after the oldest exchanges are forgotten
ROOM_SHARE = 0.25  # share of the context that is kept free for an answer at most


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, None while it waits; `stopped` if the user cut the answer.

    thought: what the model thought before it answered, if it is of that kind.
    """

    question: str
    answer: str | None = None
    stopped: bool = False
    thought: str | None = None


@dataclass
class Conversation:
    """Exchanges in order, of which only the last may wait for its answer."""

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    forgotten: int = 0

    @property
    def waiting(self) -> bool:
        """Tell whether the last question has no answer yet."""
        return bool(self.exchanges) and self.exchanges[-1].answer is None

    def ask(self, question: str) -> None:
        """Append a question that waits for its answer.

        Raises:
            DataError: the question is empty.
        """
        assert not self.waiting
        if not question.strip():
            raise DataError("the question is empty; type what the model is to answer.")
        self.exchanges.append(Exchange(question))

    def answer(self, text: str, *, stopped: bool = False, thought: str | None = None) -> None:
        """Give the waiting question its answer."""
        assert self.waiting
        last = self.exchanges[-1]
        self.exchanges[-1] = replace(last, answer=text, stopped=stopped, thought=thought)

    def copy(self) -> Conversation:
        """Return a conversation that changes independently of this one."""
        return replace(self, exchanges=list(self.exchanges))

    def retry(self) -> None:
        """Forget the last answer, so that its question waits again.

        Raises:
            OptionError: there is no question yet.
        """
        if not self.exchanges:
            raise OptionError("there is no answer to try again; ask something first.")
        self.exchanges[-1] = Exchange(self.exchanges[-1].question)

    def question(self, number: int) -> str:
        """Return the question of an exchange.

        Raises:
            OptionError: there is no exchange of that number.
        """
        if not 1 <= number <= len(self.exchanges):
            have = f"1 to {len(self.exchanges)}" if self.exchanges else "none yet"
            raise OptionError(f"there is no question {number}; the questions are {have}.")
        return self.exchanges[number - 1].question

    def edit(self, number: int, question: str) -> None:
        """Put another question in an exchange's place; it waits, and what came after it is gone.

        Raises:
            OptionError: there is no exchange of that number.
            DataError: the question is empty; nothing is changed.
        """
        self.question(number)
        if not question.strip():
            raise DataError("the question is empty; nothing was changed.")
        self._cut(number - 1)
        self.ask(question)

    def clear(self) -> None:
        """Remove every exchange; the system prompt stays."""
        self._cut(0)

    def messages(self) -> list[Message]:
        """Return what the model sees, in the form chat templates take."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in self.exchanges[self.forgotten :]:
            found.append({"role": "user", "content": exchange.question})
            if exchange.answer is not None:
                turn = {"role": "assistant", "content": exchange.answer}
                if exchange.thought is not None:  # templates keep it or leave it out
                    turn["reasoning_content"] = exchange.thought
                found.append(turn)
        return found

    def prompt(self, encode: Encode, context_length: int | None, max_tokens: int) -> list[int]:
        """Return the token ids that ask for the waiting answer, forgetting exchanges if need be.

        Room is kept for `max_tokens` (-1: any number), but for no more than a quarter of the
        context. Without it the oldest exchanges are forgotten until three quarters are in use.

        Raises:
            DataError: the newest question alone is too long; nothing is forgotten then.
        """
        assert self.waiting
        ids = encode(self.messages())
        if context_length is None:
            return ids
        room = max(1, int(context_length * ROOM_SHARE))
        if max_tokens > 0:
            room = min(room, max_tokens)
        if len(ids) + room <= context_length:
            return ids
        before = self.forgotten
        while len(ids) + room > context_length * FULL_TO and self._can_forget():
            self.forgotten += 1
            ids = encode(self.messages())
        if len(ids) >= context_length:
            self.forgotten = before
            raise DataError(
                f"the question has {len(ids)} tokens with its system prompt, but the model's "
                f"context holds {context_length}, answer included; ask something shorter."
            )
        return ids

    def _can_forget(self) -> bool:
        return self.forgotten < len(self.exchanges) - 1

    def _cut(self, count: int) -> None:
        """Keep the first `count` exchanges; if the model sees none of them, it sees all again."""
        del self.exchanges[count:]
        if self.forgotten >= count:
            self.forgotten = 0
