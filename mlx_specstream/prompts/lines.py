r"""Lines of text and of JSON: the one reader of prompt files, training data and logs.

A line ends at `\n`, `\r\n` or `\r` and nowhere else. JSON writes U+2028, U+2029 and U+0085 as they
are, so `str.splitlines`, which also ends a line there, cuts records in two. A byte order mark, at
the beginning or where files were joined, and blank lines are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError, whole_text


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield every line that is not blank, and where it stands: file and line.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(
            f"{path} cannot be read: it is not UTF-8 text; save it as UTF-8, one record a line."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line := line.lstrip("\ufeff").strip():
            yield line, f"{path}, line {number}"


def json_lines(path: Path) -> Iterator[tuple[object, str]]:
    """Yield what every line of a JSON-lines file holds, and where it stands.

    Raises:
        DataError: the file cannot be read, or a line is not JSON.
    """
    for line, where in text_lines(path):
        try:
            value: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = getattr(error, "msg", "it is nested too deeply")
            raise DataError(
                f"{where} is not valid JSON ({said}); write one object per line."
            ) from None
        if "\\u" in line:  # the file is UTF-8, so that only an escape can be half a character
            whole_text(json.dumps(value, ensure_ascii=False), where)
        yield value, where
