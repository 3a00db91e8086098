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
    text = (
        ascii(value)
        if not isinstance(value, int) or abs(value) < 1 << 200
        else "a number far too large"
    )
    return text if len(text) <= limit else text[: limit - 3] + "..."


def brief(error: Exception, limit: int = 500) -> str:
    """Return what an error says, shortened: values from a file may be endless."""
    text = str(error)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
