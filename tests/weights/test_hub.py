"""Models and streams from the hub: what is fetched, pinned, cached, and refused in one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import mlx.nn as nn
import pytest

from mlx_specstream import cli, load, stream_generate
from mlx_specstream.errors import ModelError, OptionError, SpecStreamError, StreamsError
from mlx_specstream.weights.hub import pinned
from tests.support import tiny
from tests.support.loopback import Loopback
from tests.support.scripted import save_random_streams


@pytest.fixture
def hub(
    tmp_path: Path, tiny_folder: Path, tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Loopback]:
    """Serves owner/model, another model as its revision v2, and owner/streams with one as v1."""
    hub = Loopback()
    with_code = Path(shutil.copytree(tiny_folder, tmp_path / "with-code"))
    (with_code / "modeling_tiny.py").write_text("raise SystemExit")
    hub.add("owner/model", with_code)
    other = tiny.tiny_model(seed=7)
    hub.add("owner/model", tiny.save_tiny_model(tmp_path / "other", seed=7), "v2")
    hub.add("owner/streams", save_random_streams(tmp_path / "streams", tiny_llama))
    hub.add("owner/streams", save_random_streams(tmp_path / "streams2", other), "v2")
    with hub.served(monkeypatch, tmp_path / "cache"):
        yield hub


def refused(kind: type[SpecStreamError], sentence: str, *names: str, **options: str) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        load(*names, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_model_and_streams_come_from_the_hub(hub: Loopback) -> None:
    model, tokenizer = load("owner/model", streams="owner/streams")
    *_, last = stream_generate(model, tokenizer, "hi", max_tokens=5)
    assert last.stats.drafted > 0
    assert not any(path.endswith(".py") for path in hub.asked), "code is never fetched"


def test_revisions_are_pinned(hub: Loopback) -> None:
    """v2 is another base, so streams of the wrong revision are known by their fingerprint."""
    assert load("owner/model", revision="v2", streams="owner/streams@v2")[0].streams is not None
    assert load("owner/model@v2", streams="owner/streams", streams_revision="v2")[0].streams
    commit = hub.repositories["owner/model"]["v2"][0]
    assert load(f"owner/model@{commit}", streams="owner/streams@v2")[0].streams is not None
    refused(StreamsError, "another base model", "owner/model@v2", streams="owner/streams")
    refused(ModelError, "no revision 'v9'", "owner/model", revision="v9")
    refused(StreamsError, "no revision 'v9'", "owner/model", streams="owner/streams@v9")
    refused(OptionError, "names the revision v2", "owner/model@v2", revision="main")


def test_offline_the_cache_is_all_there_is(hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    load("owner/model", streams="owner/streams")
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load("owner/model", streams="owner/streams")[0].streams is not None
    refused(ModelError, "does not hold owner/model at revision v2", "owner/model@v2")
    refused(ModelError, "HF_HUB_OFFLINE", "owner/other")
    refused(StreamsError, "HF_HUB_OFFLINE", "owner/model", streams="owner/streams2")
    assert hub.asked == []


def test_a_folder_here_comes_first(
    hub: Loopback, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("owner/model", "owner/model@v2"):
        shutil.copytree(tiny_folder, tmp_path / name)
        load(name, streams=None)
    assert hub.asked == []
    refused(OptionError, "a path here", "owner/model", revision="v2")


def test_a_revision_of_what_is_not_on_the_hub(hub: Loopback, tiny_folder: Path) -> None:
    refused(OptionError, "is the demo model", "demo", revision="v2")
    refused(OptionError, "is auto", str(tiny_folder), streams_revision="v2")
    refused(
        OptionError,
        "a set shipped",
        str(tiny_folder),
        streams="demo-chat",
        streams_revision="v2",
    )


def test_what_the_hub_refuses(
    hub: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # whatever may lie beside this checkout
    hub.gated.add("owner/streams")
    refused(StreamsError, "accepted its terms", "owner/model", streams="owner/streams")
    refused(ModelError, "no model 'owner/nothing' .* may be read", "owner/nothing")
    refused(ModelError, "the path ../x does not exist", "../x")


def test_an_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Loopback().served(monkeypatch, tmp_path):
        pass  # nobody listens any more
    refused(ModelError, "could be fetched", "owner/model")


def test_options(hub: Loopback, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "-p", "hi", "-m", "3", "--verbose", "F", "--model", "owner/model"]
    assert cli.main([*words, "--revision", "v2", "--streams", "owner/streams@v2"]) == 0
    assert cli.main([*words, "--revision", "v2", "--streams", "owner/streams"]) == 2, (
        "main's streams are of another base"
    )
    both = ["--streams", "owner/streams", "--streams-revision", "v2", "--revision", "v2"]
    assert cli.main([*words, *both]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--trust-remote-code"]) == 2
    assert "never runs code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "revision", "found"),
    [
        ("a/b", None, ("a/b", None)),
        ("a/b", "x", ("a/b", "x")),
        ("a/b@x/y", None, ("a/b", "x/y")),
        ("a/b@x", "x", ("a/b", "x")),
        ("@x", None, ("@x", None)),
        ("a/b@", None, ("a/b@", None)),
        ("a b@x", None, ("a b@x", None)),
    ],
)
def test_pinned(name: str, revision: str | None, found: tuple[str, str | None]) -> None:
    assert pinned(name, revision) == found
