"""One running chat: its session, its screen, its files, and what is switched on.

Answers a conversation's waiting question on the screen; `commands` change the rest.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from rich.text import Text

from ... import SpecStreamError
from ...errors import OptionError
from ..conversation import Conversation
from .autosave import Autosave
from .drafts import DraftView
from .interrupt import while_answering
from .reports import why_no_drafts
from .session import ChatSession, Reply
from .speed import Speed, measure
from .status import answer_status, wrapped
from .text import printable
from .view import View

IDLE_BUDGET_S = 1.5  # what the first measurement may take before the next prompt shows
ASKED_BUDGET_S = 10.0
WORTH_MEASURING = 16  # tokens of an answer
MOST_UNDONE = 100


@dataclass
class Chat:
    """Everything a command may touch.

    interactive: a person sits at a line editor. earlier: the conversations before every change,
    with the files they were kept in, for `undo`.
    """

    session: ChatSession
    view: View
    autosave: Autosave
    interactive: bool = False
    live_drafts: bool = False
    speeds: dict[Hashable, Speed | None] = field(default_factory=dict)
    earlier: list[tuple[Conversation, Path | None]] = field(default_factory=list)

    @property
    def num_streams(self) -> int:
        """Return γ, 0 without streams."""
        streams = self.session.model.streams
        return streams.num_streams if streams is not None else 0

    @property
    def speed(self) -> Speed | None:
        """Return the speed measured with the settings of now, None if there is none."""
        return self.speeds.get(self._speed_key())

    def status(self, reply: Reply | None) -> list[str]:
        """Return the parts of the status line."""
        return answer_status(self.session, reply, self.speed)

    def draft_view(self) -> DraftView:
        """Return a new picture of steps, for this terminal."""
        console = self.view.console
        coloured = console.color_system is not None and not console.no_color
        return DraftView(self.session.tokenizer, coloured=coloured)

    def answer(self, conversation: Conversation) -> None:
        """Answer the waiting question on the screen, then keep the conversation.

        Raises:
            SpecStreamError: it cannot be answered or kept.
        """
        drafts = self.draft_view() if self.live_drafts else None
        before, was = self.session.reply, self.session.conversation
        with while_answering() as stopped:
            screen = self.view.answer(
                self.status,
                drafts,
                self.num_streams,
                hides_thoughts=self.session.settings.thinking == "hidden",
            )
            try:
                for _ in self.session.answer(conversation, stopped, screen.prompt):
                    reply = self.session.current
                    assert reply is not None
                    screen.feed(reply)
            finally:
                screen.finish()
                answered = self.session.reply is not before
                if answered:
                    self._note_change(was)
            self._remark(answered)
            if answered:
                self.autosave.write(self.session.conversation)
            reply = self.session.reply
            long_enough = reply is not None and len(reply.tokens) >= WORTH_MEASURING
            if self.interactive and long_enough and self._speed_key() not in self.speeds:
                self._measure(IDLE_BUDGET_S, stopped)

    def measure_speed(self) -> Speed | None:
        """Measure the speed against plain decoding anew, Ctrl-C stops it."""
        with while_answering() as stopped:
            return self._measure(ASKED_BUDGET_S, stopped)

    def replace_conversation(self, conversation: Conversation) -> None:
        """Go on with another conversation; the KV cache keeps what the two share."""
        self._note_change(self.session.conversation)
        self.session.conversation = conversation
        self.session.reply = None

    def change_system(self, text: str | None) -> None:
        """Give the conversation another system prompt."""
        self._note_change(self.session.conversation)
        self.session.conversation = self.session.conversation.copy()
        self.session.conversation.system = text

    def undo(self) -> None:
        """Go back to the conversation before its last change.

        Raises:
            OptionError: nothing has been changed yet.
            OutputError: it cannot be kept.
        """
        if not self.earlier:
            raise OptionError("there is nothing to undo yet.")
        self.session.conversation, self.autosave.own = self.earlier.pop()
        self.session.reply = None
        self.autosave.write(self.session.conversation)

    def _note_change(self, before: Conversation) -> None:
        """Note what the conversation was before it changes."""
        self.earlier.append((before, self.autosave.own))
        del self.earlier[:-MOST_UNDONE]

    def show_exchange(self, number: int) -> None:
        """Show one question and its answer."""
        exchange = self.session.conversation.exchanges[number - 1]
        self.view.show(Text(f"{number} › {printable(exchange.question)}", style="bold"))
        if exchange.thought and self.session.settings.thinking != "hidden":
            self.view.thought(exchange.thought)
        if exchange.answer:
            self.view.markdown(exchange.answer)

    def described(self, *more: str) -> str:
        """Return model, mode and tree, and what more there is to say."""
        session = self.session
        parts = [short_name(session.model.name), session.mode]
        if session.mode != "plain":
            parts.append(f"tree {session.settings.decode.tree}")
        if session.model.context_length is not None:
            parts.append(f"context {session.model.context_length}")
        return wrapped([*parts, *more], self.view.console.width - 1)

    def _measure(self, budget_s: float, stopped: object) -> Speed | None:
        assert callable(stopped)
        speed = measure(self.session, budget_s, stopped)
        self.speeds[self._speed_key()] = speed
        return speed

    def _speed_key(self) -> Hashable:
        settings = self.session.settings
        return (settings.decode, settings.mode, repr(settings.sampling))

    def _remark(self, answered: bool) -> None:
        """Say what the answer itself does not show."""
        if not answered:
            self.view.note("(stopped before the first word; nothing was changed)")
            return
        reply = self.session.reply
        assert reply is not None
        assert reply.last is not None
        if reply.forgot:
            count = self.session.conversation.forgotten
            self.view.note(
                f"(context full: the model no longer sees questions 1 to {count}; the system "
                "prompt and what is newer it does)"
            )
        if reply.stopped:
            self.view.note("(stopped)")
        elif reply.last.finish_reason == "length" and reply.splitter.inside:
            self.view.note(
                "(cut while it was thinking: /set max-tokens allows longer answers, /set thinking "
                "off asks for none of this)"
            )
        elif reply.last.finish_reason == "length":
            self.view.note("(cut: /set max-tokens allows longer answers)")
        if self.live_drafts and not reply.last.stats.drafted:
            self.view.note(why_no_drafts(self.session))


def short_name(name: str) -> str:
    """Return a model's name without the folder it lies in."""
    path = Path(name).expanduser()
    return path.absolute().name if path.is_dir() else name


def one_sentence(error: SpecStreamError) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())
