"""What messages of the newer APIs are made of: lists of parts, of which text alone can be read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .errors import ApiError, invalid
from .messages_schema import Strict, Text, as_text, is_parts
from .refusals import is_media, no_media
from .schema import parsed


class _TextPart(Strict):
    text: Text


def text_of(content: Any, at: tuple[str | int, ...], readable: Collection[str]) -> str:
    """Return the text of a message's content: a string, or parts of `readable` types.

    Raises:
        ApiError: it is something else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(at, "content must be text or a list of parts.")
    texts = []
    for place, part in enumerate(content):
        kind = type_of(part, (*at, place))
        if kind not in readable:
            raise unreadable(kind, (*at, place))
        texts.append(parsed(_TextPart, part, (*at, place)).text)
    return "".join(texts)


def output_of(content: Any, at: tuple[str | int, ...], readable: Collection[str]) -> str:
    """Return the text of what a tool gave, which may also be any JSON.

    Raises:
        ApiError: there are parts that are not `readable`.
    """
    if is_parts(content):
        return text_of(content, at, readable)
    return as_text(content) or ""


def type_of(part: Any, at: tuple[str | int, ...]) -> str:
    """Return what a part says that it is, "" if it does not.

    Raises:
        ApiError: it is no object, or its type no text.
    """
    if not isinstance(part, dict):
        raise wrong(at, "each part must be an object with a type.")
    kind = part.get("type")
    if not isinstance(kind, str | None):
        raise wrong(at, "the type must be text.")
    return kind or ""


def unreadable(kind: str, at: tuple[str | int, ...]) -> ApiError:
    """Return the error of a part or a tool that this server does not know."""
    if not kind:
        return wrong(at, "its type is missing.")
    if is_media(kind):
        return wrong(at, no_media(kind))
    return wrong(at, f"{kind[:100]!r} is not supported by this server; leave it out.")


def wrong(at: tuple[str | int, ...], message: str) -> ApiError:
    """Return the error of a request's part, which stands `at` a place in it."""
    return invalid(f"{'.'.join(str(step) for step in at)}: {message}", str(at[0]))
