"""Reading what may be hostile: what it costs is bounded by constants, whatever the file claims."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import SpecStreamError

MAX_JSON_ITEMS = 4_000_000
"""Values in one JSON text; an index of 100,000 tensors has 100,000, a header of as many a million."""


def open_file(path: Path, error: type[SpecStreamError]) -> BinaryIO:
    """Open a file to read, unbuffered by its size; a pipe or device, which may never end, is refused.

    Raises:
        error: missing, not a regular file, or no permission.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise error(
            f"{path} cannot be read ({reason}); check the path and its permissions."
        ) from None
    raise error(f"{path} is not a file but a pipe, device or folder; name a file.")


def read_file(path: Path, limit: int, error: type[SpecStreamError]) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes.

    Raises:
        error: as `open_file`, or the file is larger.
    """
    with open_file(path, error) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(
            f"{path} is larger than {limit >> 20} MB, too large for what it is; get it again."
        )
    return data


def parse_json(data: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> object:
    """Return the value of a JSON text in UTF-8, unless it holds absurdly many values.

    A value costs up to 100 bytes and two letters make one (`{}`), so values are counted before they
    are made: no text has more than separators and brackets.

    Raises:
        ValueError: not JSON, too deep or too many values; one clause.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_ITEMS:
        raise ValueError(f"it holds more than {MAX_JSON_ITEMS} values")
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
