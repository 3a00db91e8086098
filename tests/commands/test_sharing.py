"""Streams are shared on the hub, found there by the model's fingerprint, and used by their name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.nn as nn
import pytest

from mlx_specstream import cli, load
from tests.support import tiny
from tests.support.loopback import Loopback
from tests.support.scripted import save_random_streams


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    hub = Loopback()
    with hub.served(monkeypatch, tmp_path / "cache"):
        yield hub


def run(*words: object) -> int:
    return cli.main([*map(str, words)])


def test_what_is_uploaded_is_found_and_used(
    hub: Loopback, tiny_folder: Path, tiny_llama: nn.Module, tmp_path: Path, capsys
) -> None:
    mine = save_random_streams(tmp_path / "mine", tiny_llama)
    (mine / "private.txt").write_text("not for others")
    assert run("upload", mine, "owner/mine") == 0
    assert "--streams owner/mine" in capsys.readouterr().out
    files = hub.repositories["owner/mine"]["main"][1]
    assert {"README.md", "streams.safetensors", "streams_config.json"} <= set(files)
    assert "private.txt" not in files
    assert b"speculative-streaming" in files["README.md"]

    other = tiny.tiny_model(seed=7)
    hub.add("owner/others", save_random_streams(tmp_path / "others", other))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "streams_config.json").write_text('{"version": 1, "metadata": 3}')
    hub.add("owner/damaged", damaged)
    assert run("find", tiny_folder) == 0
    told = capsys.readouterr().out
    assert "owner/mine: lossless" in told
    assert "others" not in told
    assert "damaged" not in told
    assert run("find", tiny_folder, "--json") == 0
    assert [one["repository"] for one in json.loads(capsys.readouterr().out)] == ["owner/mine"]
    assert load(str(tiny_folder), streams="owner/mine")[0].streams is not None


def test_nothing_that_fits_is_said(hub: Loopback, tiny_folder: Path, capsys) -> None:
    assert run("find", tiny_folder) == 0
    assert "Nobody has shared streams" in capsys.readouterr().out


def test_refusals_are_a_sentence(
    hub: Loopback, tiny_folder: Path, tiny_llama: nn.Module, tmp_path: Path, capsys
) -> None:
    mine = save_random_streams(tmp_path / "mine", tiny_llama)
    hub.add("owner/gated", mine)
    hub.gated.add("owner/gated")
    for words, said in (
        (("upload", mine, "a/b/c"), "is no repository"),
        (("upload", tmp_path, "owner/mine"), "holds no streams_config.json"),
        (("upload", mine, "owner/gated"), "could not be uploaded to owner/gated"),
        (("find", tiny_folder, "--limit", "0"), "--limit must be at least 1"),
    ):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert "owner/mine" not in hub.repositories
