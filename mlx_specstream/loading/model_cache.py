"""Models that are made once and kept: whole or not at all, by one process at a time.

SPECSTREAM_CACHE, else ~/Library/Caches/mlx-specstream (macOS) or $XDG_CACHE_HOME/mlx-specstream
smollm2-135m-instruct-1/        config.json, model.safetensors, ..., files.json with the sizes of the others
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ..errors import OutputError
from ..weights.files import atomic_folder, remove_leftovers

_MANIFEST = "files.json"


def cache_folder() -> Path:
    """Return where this package keeps what it can make again, absolute; it need not exist."""
    if named := os.environ.get("SPECSTREAM_CACHE"):
        return Path(named).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-specstream"
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "mlx-specstream"


def made_once(name: str, title: str, needed_bytes: int, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache, having `make` fill it first if need be.

    Safe to call from several processes at once; one makes the folder, the others wait. `title` is
    what it is called in messages, such as "the demo model".

    Raises:
        OutputError: the cache cannot be written or its disk is full.
    """
    folder = cache_folder() / name
    if is_whole(folder):
        return folder
    with _locked(folder, title):
        if not is_whole(folder):
            _check_space(folder.parent, title, needed_bytes)
            remove_leftovers(folder)
            with atomic_folder(folder, if_exists="replace") as partial:
                make(partial)
                sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
                text = json.dumps(sizes, indent=2) + "\n"
                (partial / _MANIFEST).write_text(text, encoding="utf-8")
    return folder


def is_whole(folder: Path) -> bool:
    """Compare the folder's files with the sizes noted when it was made; a cleaned-up cache is made again."""
    try:
        sizes: dict[str, int] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file into a folder, showing a bar, and remove the file.

    Raises:
        CheckpointError: the file is damaged, or of a kind that is not converted.
    """
    from ..convert.gguf import open_gguf, write_model_folder

    with tqdm(unit="B", unit_scale=True, desc="convert", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        write_model_folder(open_gguf(path), folder, show)
    path.unlink()


def say(line: str) -> None:
    """Tell the user on stderr, where no output of a command is disturbed."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _locked(folder: Path, title: str) -> Iterator[None]:
    """Let one process at a time make `folder`; the lock ends with the process, however that ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise OutputError(
            f"The cache folder {folder.parent} cannot be written ({error.strerror}); name another in SPECSTREAM_CACHE."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another process is preparing {title}; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_space(folder: Path, title: str, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"Preparing {title} takes {needed_bytes // 10**6} MB and {folder} has {free // 10**6} MB free; "
            "free some space or name another place in SPECSTREAM_CACHE."
        )
