"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mlx_specstream.errors import OptionError, OutputError
from mlx_specstream.weights import files
from mlx_specstream.weights.files import (
    atomic_file,
    atomic_folder,
    refuse_same_file,
    remove_leftovers,
)

MAKERS = pytest.mark.parametrize("kind", ["file", "folder"])


def opened(kind: str, target: Path, if_exists: Any = "error") -> AbstractContextManager[Path]:
    return (atomic_file if kind == "file" else atomic_folder)(target, if_exists=if_exists)


def fill(kind: str, path: Path, text: str) -> None:
    if kind == "file":
        path.write_text(text)
    else:
        (path / "inner").mkdir()
        (path / "inner" / "file").write_text(text)


def content(kind: str, path: Path) -> str:
    return (path if kind == "file" else path / "inner" / "file").read_text()


@MAKERS
def test_appears_when_the_block_ends(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "a" / "b" / "x.json"
    with opened(kind, target) as partial:
        fill(kind, partial, "new")
        assert not target.exists()
        assert partial.parent == target.parent
        assert partial.name.startswith(".x.json.")
    assert content(kind, target) == "new"
    assert list(target.parent.iterdir()) == [target]


@MAKERS
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, kind: str, failure: type[BaseException]
) -> None:
    for old in (False, True):
        target = tmp_path / f"x{old}"
        if old:
            with opened(kind, target) as partial:
                fill(kind, partial, "old")
        with pytest.raises(failure), opened(kind, target, "replace") as partial:
            fill(kind, partial, "new")
            raise failure
        assert target.exists() is old
        assert not old or content(kind, target) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["xTrue"]


@MAKERS
def test_what_exists_is_refused_kept_or_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    for if_exists, expected in (("error", "1"), ("replace", "2"), ("keep", "2")):
        with opened(kind, target, if_exists) as partial:
            fill(kind, partial, str(int(content(kind, target)) + 1 if target.exists() else 1))
        assert content(kind, target) == expected
    with pytest.raises(OutputError, match="exists already"), opened(kind, target):
        pytest.fail("refused before any work")
    assert content(kind, target) == "2"
    assert list(tmp_path.iterdir()) == [target]


@MAKERS
def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    with pytest.raises(OutputError, match="exists already"), opened(kind, target) as partial:
        fill(kind, partial, "mine")
        if kind == "folder":
            target.mkdir()
        fill(kind, target, "theirs")
    assert content(kind, target) == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(files.os, "link", no_links)
    target = tmp_path / "x"
    for if_exists in ("error", "keep"):
        with atomic_file(target, if_exists=if_exists) as partial:
            partial.write_text(if_exists)
        assert target.read_text() == "error"


def test_an_empty_folder_counts_as_absent(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with atomic_folder(tmp_path / "x", if_exists="error") as partial:
        fill("folder", partial, "new")
    assert content("folder", tmp_path / "x") == "new"


def test_a_link_keeps_pointing_where_it_does(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link", if_exists="replace") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_suffix_is_kept(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "x.safetensors", if_exists="error") as partial:
        assert partial.suffix == ".safetensors"
        partial.touch()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "x", if_exists="error") as partial:
            (partial / "file").touch()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "x" / "file").stat().st_mode) == 0o640


def test_kinds_are_not_mixed_up(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file where a folder"):
        opened("folder", tmp_path / "file", "replace").__enter__()
    with pytest.raises(OutputError, match="is a folder where a file"):
        opened("file", tmp_path, "replace").__enter__()
    with pytest.raises(OutputError, match="part of its path is a file"):
        opened("file", tmp_path / "file" / "x").__enter__()


@MAKERS
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (RuntimeError("[write] Unable to write 1564 bytes to file."), "disk is probably full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "permission is missing"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
    ],
)
def test_reasons_in_plain_words(tmp_path: Path, kind: str, error: Exception, said: str) -> None:
    with pytest.raises(OutputError, match=said) as caught, opened(kind, tmp_path / "x"):
        raise error
    assert str(tmp_path / "x") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@MAKERS
def test_other_errors_come_through(tmp_path: Path, kind: str) -> None:
    """A missing input is not a failure to write."""
    with pytest.raises(FileNotFoundError), opened(kind, tmp_path / "x"):
        (tmp_path / "input").read_text()
    with pytest.raises(PermissionError), opened(kind, tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@MAKERS
def test_without_permission(tmp_path: Path, kind: str) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission is missing"):
        opened(kind, tmp_path / "x").__enter__()


def test_leftovers(tmp_path: Path) -> None:
    target = tmp_path / "x[1].bin"
    for path in (files._partial_sibling(target), files._partial_sibling(target, ".bin")):
        path.touch()
    (tmp_path / ".x[1].bin.12345678.partial").mkdir()
    kept = [tmp_path / "x[1].bin", tmp_path / ".x1.bin.12345678.partial", tmp_path / "other"]
    for path in kept:
        path.touch()
    remove_leftovers(target)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_two_options_that_name_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    refuse_same_file({"--data": [tmp_path / "a", tmp_path / "b"], "--output": tmp_path / "c"})
    for options, message in (
        ({"--data": tmp_path / "a", "--output": tmp_path / "link"}, "--data and --output would"),
        (
            {"--output": tmp_path / "c", "--states": [tmp_path / ".." / tmp_path.name / "c"]},
            "--states",
        ),
        ({"--data": [tmp_path / "a", tmp_path / "a"]}, "--data, twice, would"),
    ):
        with pytest.raises(OptionError, match=message):
            refuse_same_file(options)
