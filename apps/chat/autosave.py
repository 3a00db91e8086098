"""Keeps a chat's conversation in files: by itself after every answer, and where a person says."""

from __future__ import annotations

from pathlib import Path

from ...weights.files import IfExists
from ..conversation import Conversation
from ..saving import load_conversation, save_conversation
from .paths import new_conversation_file


class Autosave:
    """Knows which files are this chat's own, so that it overwrites no others.

    own: the file that follows the conversation, None until there is something to keep.
    """

    def __init__(self, model: str, *, automatic: bool, own: Path | None = None) -> None:
        self.model = model
        self.automatic = automatic
        self.own = own
        self.may_replace: set[Path] = set()

    def write(self, conversation: Conversation) -> None:
        """Write the conversation to the chat's own file, which begins with the first question.

        Raises:
            OutputError: it cannot be written.
        """
        if not self.automatic or not (conversation.exchanges or self.own):
            return
        if self.own is None:
            self.own = new_conversation_file()
        save_conversation(conversation, self.own, self.model, if_exists="replace")

    def save(self, conversation: Conversation, name: str) -> Path:
        """Write the conversation to a file that a person names; return its path.

        Raises:
            OutputError: another file is there already, or it cannot be written.
        """
        path = Path(name).expanduser()
        replace: IfExists = "replace" if path.absolute() in self.may_replace else "error"
        save_conversation(conversation, path, self.model, if_exists=replace)
        self.may_replace.add(path.absolute())
        return path

    def load(self, name: str) -> Conversation:
        """Read a conversation that a person names; `save` may replace its file.

        Raises:
            DataError: the file cannot be read or holds something else.
        """
        path = Path(name).expanduser()
        conversation = load_conversation(path)
        self.may_replace.add(path.absolute())
        return conversation

    def start_over(self) -> None:
        """Leave the chat's own file as it is and follow the conversation in a new one."""
        self.own = None
