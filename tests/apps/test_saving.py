from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream.apps.chat.autosave import Autosave
from mlx_specstream.apps.chat.paths import newest_conversation
from mlx_specstream.apps.conversation import Conversation, Exchange
from mlx_specstream.apps.saving import FORMAT, load_conversation, save_conversation
from mlx_specstream.errors import DataError, OutputError

TALK = Conversation("be kind", [Exchange("a", "A"), Exchange("b\n👍🏽", "", True)], 1)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "talk.json"
    save_conversation(TALK, path, "demo", if_exists="error")
    assert load_conversation(path) == TALK
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["talk.json"]


exchanges = st.builds(
    Exchange,
    st.text(min_size=1).filter(str.strip),
    st.text(st.characters(codec=None)),
    st.booleans(),
)


@given(st.none() | st.text(), st.lists(exchanges, max_size=4))
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory, system: str | None, entries: list[Exchange]
) -> None:
    path = tmp_path_factory.mktemp("any") / "talk.json"
    save_conversation(Conversation(system, entries), path, "demo", if_exists="error")
    assert load_conversation(path) == Conversation(system, entries)


def test_another_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("mine")
    autosave = Autosave("demo", automatic=True)
    with pytest.raises(OutputError, match="exists already"):
        autosave.save(TALK, str(path))
    assert path.read_text() == "mine"


def test_a_chats_own_files_are_replaced(tmp_path: Path) -> None:
    autosave = Autosave("demo", automatic=True)
    path = autosave.save(TALK, str(tmp_path / "talk.json"))
    autosave.save(Conversation(None, [Exchange("x", "y")]), str(path))
    assert load_conversation(path).exchanges == [Exchange("x", "y")]
    other = Autosave("demo", automatic=True)
    other.load(str(path))
    other.save(TALK, str(path))
    assert load_conversation(path) == TALK


def test_a_conversation_follows_into_its_own_file(tmp_path: Path) -> None:
    autosave = Autosave("demo", automatic=True)
    autosave.write(Conversation())
    assert autosave.own is None, "nothing to keep"
    autosave.write(TALK)
    first = autosave.own
    autosave.write(TALK)
    assert autosave.own == first == newest_conversation()
    assert first is not None
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    autosave.start_over()
    autosave.write(TALK)
    assert autosave.own != first
    assert first.is_file()
    quiet = Autosave("demo", automatic=False)
    quiet.write(TALK)
    assert quiet.own is None


def test_there_may_be_nothing_to_resume() -> None:
    with pytest.raises(DataError, match="no earlier conversation"):
        newest_conversation()


GOOD: dict[str, Any] = {"format": FORMAT, "version": 1, "system": None, "exchanges": []}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([], "not a conversation"),
        ({"format": "other"}, "not a conversation"),
        ({**GOOD, "version": 2}, "version is 2"),
        ({**GOOD, "system": 3}, "system prompt"),
        ({**GOOD, "exchanges": {}}, "no list"),
        ({**GOOD, "exchanges": [1]}, "exchange 1 is no object"),
        ({**GOOD, "exchanges": [{"question": " ", "answer": "a"}]}, "no question"),
        ({**GOOD, "exchanges": [{"question": "a"}]}, "no answer"),
        ({**GOOD, "exchanges": [{"question": "a", "answer": "b", "stopped": 1}]}, "no answer"),
        ({**GOOD, "forgotten": 1}, "cannot have forgotten 1"),
        ({**GOOD, "forgotten": True}, "cannot have forgotten True"),
        (None, "No such file"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "talk.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=reason) as caught:
        load_conversation(path)
    assert "\n" not in str(caught.value)
