"""What the tests of the apps share: a parrot on disk, and tiny chats."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_specstream import StreamModel, load
from tests.apps.parrot import save_parrot


@pytest.fixture(scope="session")
def parrot_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that always answers with `parrot.ANSWER`, two tokens a step."""
    return save_parrot(tmp_path_factory.mktemp("models") / "parrot")


@pytest.fixture(scope="session")
def parrot(parrot_folder: Path) -> tuple[StreamModel, object]:
    """The parrot, loaded: model and tokenizer."""
    return load(str(parrot_folder))


@pytest.fixture(autouse=True)
def _state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test's state to itself."""
    monkeypatch.setenv("SPECSTREAM_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("LINES", raising=False)
