"""Files and folders that appear whole or not at all.

Everything is written beside its target under a temporary name ending in `.partial`, and renamed when complete:

    folder/                            folder/
      .model.3f9a1c.partial/   --->      model/
        config.json                        config.json
        model.safetensors                  model.safetensors

A failure, Ctrl-C included, removes the temporary sibling and leaves what was there before. A killed process leaves at
worst a `.partial` sibling, which nothing ever reads.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Literal

from ..errors import OptionError, OutputError

IfExists = Literal["error", "replace", "keep"]
"""What to do when the target exists already: refuse before any work, replace it when the new one is complete, or keep
the old one if it has appeared by then (two processes making the same thing)."""

_PARTIAL = ".partial"
_READ_WHOLE = 64 << 20
_BLOCK, _BLOCKS = 4096, 256  # of a larger file


def without_folders(name: str) -> str:
    """Return what a model or streams are called: of a path its last part, a hub's id as it is."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or name.startswith(".") or path.exists() else name


def sketch(folder: Path, patterns: Sequence[str]) -> bytes:
    """Return 32 bytes that tell whether two folders hold the same files: names, sizes, samples.

    Small files are read whole, of large ones blocks from end to end.
    """
    found = sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        size = path.stat().st_size
        found.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _READ_WHOLE:
                found.update(file.read())
                continue
            for number in range(_BLOCKS):
                file.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return found.digest()


@contextmanager
def atomic_folder(target: str | Path, *, if_exists: IfExists) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `target` when the block ends without an error.

    Parents of `target` are created. An existing empty folder counts as absent.

    Raises:
        OutputError: `target` exists (`if_exists="error"`), is a file, or cannot be written.
    """
    final = _final_path(target)
    refuse_existing(target, files_only=if_exists != "error")
    with _plain_sentences(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_sibling(final)
        partial.mkdir()
    try:
        with _plain_sentences(final, partial):
            yield partial
            _sync_tree(partial)
            _move_folder(partial, final, if_exists)
            _sync_folder(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(target: str | Path, *, if_exists: IfExists) -> Iterator[Path]:
    """Yield a path to write (same suffix as `target`); it becomes `target` when the block ends without an error.

    The file does not exist yet when the block starts, and must when it ends. Parents of `target` are created.

    Raises:
        OutputError: `target` exists (`if_exists="error"`), is a folder, or cannot be written.
    """
    final = _final_path(target)
    if final.is_dir():
        raise OutputError(f"{final} is a folder where a file is to be written; name a file.")
    if if_exists == "error" and final.exists():
        raise _exists_already(final)
    with _plain_sentences(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_sibling(final, final.suffix)
    try:
        with _plain_sentences(final, partial):
            yield partial
            _sync_file(partial)
            _move_file(partial, final, if_exists)
            _sync_folder(final.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def refuse_existing(target: str | Path, *, files_only: bool = False) -> None:
    """Refuse to write a folder where something is, before any work is done for it.

    Raises:
        OutputError: `target` is a file or below one, has a name that is too long, or is (unless
            `files_only`) a folder that is not empty.
    """
    final = _final_path(target)
    with _plain_sentences(final):
        if final.exists() and not final.is_dir():
            raise OutputError(
                f"{final} is a file where a folder is to be written; move it or name another folder."
            )
        if not next(each for each in final.parents if each.exists()).is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not files_only and _occupied(final):
            raise _exists_already(final)


def writable_parent(target: str | Path) -> None:
    """Make sure that something can be written beside `target`, before any work is done for it.

    Raises:
        OutputError: why not.
    """
    final = _final_path(target)
    try:
        with _plain_sentences(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=final.parent):
                pass
    except OSError as error:
        raise OutputError(
            f"{final} cannot be written ({error.strerror}); name another place."
        ) from error


def remove_leftovers(target: str | Path) -> None:
    """Remove the `.partial` siblings that killed processes left beside `target`.

    Only for a caller that knows nobody is writing `target` now (it holds a lock).
    """
    final = _final_path(target)
    for sibling in final.parent.glob(f".{_escaped(final.name)}.*{_PARTIAL}*"):
        if sibling.is_dir() and not sibling.is_symlink():
            shutil.rmtree(sibling, ignore_errors=True)
        else:
            sibling.unlink(missing_ok=True)


def refuse_same_file(options: Mapping[str, str | Path | Sequence[str | Path]]) -> None:
    """Check that options name different files; links are followed, and the files need not exist.

    options: option -> its file or files, as in {"--data": [...], "--output": "own.jsonl"}.

    Raises:
        OptionError: two of them are the same file.
    """
    taken: dict[Path, str] = {}
    for option, files in options.items():
        for file in [files] if isinstance(files, str | Path) else files:
            path = Path(file).expanduser().resolve()
            if path in taken:
                both = (
                    f"{taken[path]} and {option}" if taken[path] != option else f"{option}, twice,"
                )
                raise OptionError(f"{both} would use the same file {file}; give one another name.")
            taken[path] = option


def _final_path(target: str | Path) -> Path:
    """Return `target` as an absolute path with links followed, so that a link keeps pointing where it does."""
    return Path(os.path.realpath(Path(target).expanduser()))


def _partial_sibling(final: Path, suffix: str = "") -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}{_PARTIAL}{suffix}")


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _occupied(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _exists_already(final: Path) -> OutputError:
    return OutputError(
        f"{final} exists already and is left as it is; remove it or name another place."
    )


def _move_folder(partial: Path, final: Path, if_exists: IfExists) -> None:
    """Rename `partial` to `final`; on POSIX a rename onto an empty folder succeeds, onto a full one fails."""
    try:
        partial.rename(final)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if if_exists == "keep":
        return
    if if_exists == "error":
        raise _exists_already(final)
    old = _partial_sibling(final)
    final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move_file(partial: Path, final: Path, if_exists: IfExists) -> None:
    if if_exists == "replace":
        partial.replace(final)
        return
    try:
        os.link(partial, final)  # unlike a rename, fails if somebody made the file meanwhile
    except FileExistsError:
        if if_exists == "error":
            raise _exists_already(final) from None
    except OSError:  # a file system without hard links
        if not final.exists():
            partial.replace(final)
        elif if_exists == "error":
            raise _exists_already(final) from None


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Make renames inside `path` durable; some file systems do not offer it for folders."""
    with suppress(OSError):
        _sync_file(path)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync_file(Path(parent) / name)
        _sync_folder(Path(parent))


@contextmanager
def _plain_sentences(final: Path, partial: Path | None = None) -> Iterator[None]:
    """Turn a failure to write `final` into one sentence; let every other error through."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        reason = _reason(error, partial)
        if reason is None:
            raise
        raise OutputError(
            f"{final} cannot be written: {reason}; nothing was left behind."
        ) from error


def _reason(error: Exception, partial: Path | None) -> str | None:
    """Say why writing failed, or None if `error` is about something else (an input file, a bug)."""
    if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
        return "the disk is full; free some space or name another place"  # safetensors gives the words, no errno
    if isinstance(error, RuntimeError) and "Unable to write" in str(error):
        return "the disk is probably full; free some space or name another place"  # MLX's words, no errno
    if not isinstance(error, OSError):
        return None
    if error.filename and partial and not str(error.filename).startswith(str(partial)):
        return None
    reasons = {
        errno.ENOENT: "no folder can be made there; name another place",
        errno.EACCES: "permission is missing; name a place you may write to",
        errno.EPERM: "permission is missing; name a place you may write to",
        errno.EROFS: "the file system is read-only; name another place",
        errno.ENOTDIR: "a part of its path is a file, not a folder",
        errno.EEXIST: "a part of its path is a file, not a folder",
        errno.ENAMETOOLONG: "its name is too long for this file system",
        errno.EFBIG: "it is larger than this file system allows",
        errno.EIO: "the device reports an input/output error",
    }
    return reasons.get(error.errno or 0)
