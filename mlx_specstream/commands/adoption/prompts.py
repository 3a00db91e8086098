"""What the model is asked: the user's own prompts and documents first, else and after them built-in ones.

A document becomes prompts by parts: each is a page or less, and asked about in turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from ...errors import DataError
from ...train.data import Record
from ...train.prompt_kinds import kind_records
from ..distill import records_of

PART_LETTERS = 1500
REQUESTS = (
    "Summarise this text in a few sentences.",
    "List the key points of this text.",
    "What questions does this text answer? Name three, each with its answer.",
    "Explain this text in simpler words.",
    "What follows from this text, and what does it leave open?",
)


def records_for(prompts: str | None, documents: Sequence[str]) -> list[Record]:
    """Return what to ask, always in the same order.

    Raises:
        DataError: a file cannot be read or holds no text.
    """
    own = records_of(prompts, "train") if prompts else []
    if prompts and not own:
        raise DataError(f"{prompts} holds no prompts; write one per line, as JSON.")
    parts = [record for name in documents for record in _document(Path(name).expanduser())]
    mixed = [r for pair in zip_longest(own, parts) for r in pair if r is not None]
    # Indices name answers in the file, so they are those of the whole list.
    return list(chain(mixed, kind_records()))


def _document(path: Path) -> Iterator[Record]:
    """Yield a prompt for every part of a document."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"the document {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise DataError(f"the document {path} is not UTF-8 text; give plain text.") from None
    if not text.strip():
        raise DataError(f"the document {path} is empty.")
    for number, part in enumerate(parts_of(text)):
        request = REQUESTS[number % len(REQUESTS)]
        yield Record({"prompt": f"{request}\n\n{part}"}, f"{path}, part {number + 1}")


def parts_of(text: str) -> Iterator[str]:
    """Yield a text's parts of at most `PART_LETTERS` letters, cut between paragraphs where there are any."""
    part = ""
    for paragraph in (p.strip() for p in text.split("\n\n") if p.strip()):
        while len(paragraph) > PART_LETTERS:
            cut = paragraph.rfind(" ", PART_LETTERS // 2, PART_LETTERS)
            cut = cut if cut > 0 else PART_LETTERS
            if part:
                yield part
                part = ""
            yield paragraph[:cut]
            paragraph = paragraph[cut:].strip()
        if part and len(part) + len(paragraph) + 2 > PART_LETTERS:
            yield part
            part = ""
        part = f"{part}\n\n{paragraph}" if part else paragraph
    if part:
        yield part
