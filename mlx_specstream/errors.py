"""The errors a user can cause, one family.

Every message is one sentence that a person can act on: what was wrong, what was expected, what to do. The command line
prints it on one line and exits 2; a traceback is always a bug of ours.
"""


class SpecStreamError(Exception):
    """What the user gave cannot be used; the message says why and what to do. Base of the family."""


class OptionError(SpecStreamError, ValueError):
    """An option or argument has a value outside what it may be, or contradicts another one."""


class ModelError(SpecStreamError):
    """A base model is missing, cannot be fetched, or is of a kind that cannot be decoded exactly."""


class StreamsError(SpecStreamError):
    """Stream weights or their config are missing, damaged, or belong to another base model."""


class CheckpointError(SpecStreamError):
    """A checkpoint to convert (PyTorch, GGUF, safetensors) is damaged, unsafe or of an unknown layout."""


class DataError(SpecStreamError):
    """A prompt, data set or conversation cannot be read or does not hold what was asked of it."""


class OutputError(SpecStreamError):
    """A result cannot be written: it exists already, the disk is full, or permission is missing."""


def shown(value: object, limit: int = 120) -> str:
    """Return a value from a file as an error message may show it: quoted, one line, not endless."""
    huge = isinstance(value, int) and abs(value) >= 1 << 200
    return _shortened("a number far too large" if huge else ascii(value), limit)


def brief(said: object, limit: int = 200) -> str:
    """Return what an error says as part of a sentence: one line, not endless, without a full stop.

    The first line says what is wrong, excerpts and advice follow; where it ends in a colon, the
    next one says it. An error that says nothing is told by its class.
    """
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    text = lines[0] if lines else type(said).__name__
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    return _shortened(text, limit).rstrip(".:")


def printable(text: str) -> str:
    """Return text as a terminal may get it: one line, control characters written as escapes.

    Names of files and tensors are other people's: none of them may clear the screen.
    """
    return "".join(
        letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(text.split())
    )


def whole_text(text: str, what: str) -> str:
    """Return a text that is Unicode as it stands; `what` it is, for the message.

    Raises:
        DataError: it holds half of a surrogate pair. Python makes them of JSON's escapes and of
            bytes on the command line that are not UTF-8; tokenizers cannot read them.
    """
    if half := next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None):
        raise DataError(
            f"{what} holds half a character (U+{ord(half):04X}), which is no Unicode text; give "
            "the whole character, as UTF-8."
        )
    return text


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
