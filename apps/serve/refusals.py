"""What is wrong with a request, in a sentence that names the field and what it may hold.

pydantic says where a value does not fit; what would fit is read from the same description that
/openapi.json shows, so no type names of Python's reach a client.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import ApiError, invalid

Json = dict[str, Any]
Place = tuple[str | int, ...]
_MEDIA = ("image", "audio", "video", "file", "document", "screenshot")
_LARGE = 2**20  # limits beyond it are not worth telling


def explained(
    kind: type[BaseModel], values: object, error: ValidationError, at: Place = ()
) -> ApiError:
    """Return what is wrong first with `values`, which stand `at` a place of a request.

    Of a value that may be of several types the innermost complaint tells most.
    """
    found = error.errors(include_url=False, include_input=False)
    root = found[0]["loc"][:1]
    candidates = [(_place(one["loc"], values), one) for one in found if one["loc"][:1] == root]
    place, worst = max(candidates, key=lambda pair: len(pair[0]))
    param = next((str(part) for part in (*at, *root)), None)
    if worst["type"] == "value_error":  # one of our own
        return invalid(worst["msg"].removeprefix("Value error, "), param)
    if worst["loc"][-1:] == ("[key]",):
        name = ".".join(map(str, (*at, *place[:-1])))
        return invalid(f"{name}: {place[-1]!r} is no token id, written as text.", param)
    if worst["type"].startswith("union_tag"):
        kind_given = worst["ctx"].get("tag", "")
        if is_media(kind_given):
            return invalid(f"{'.'.join(map(str, (*at, *place)))}: {no_media(kind_given)}", param)
        place = (*place, worst["ctx"]["discriminator"].strip("'"))
    value, missing = _value(place, values)
    allowed = _words(_options(kind, place))
    name = ".".join(str(part) for part in (*at, *place)) or "the request"
    if missing:
        return invalid(f"{name} is missing; it must be {allowed}.", param)
    return invalid(f"{name} must be {allowed}, got {_shown(value)}.", param)


def is_media(kind: str) -> bool:
    """Tell whether a part of this type holds something else than text."""
    return any(word in kind for word in _MEDIA)


def no_media(kind: str) -> str:
    """Return why a part of this type is refused."""
    return f"{kind[:100]!r} cannot be read: the model reads text alone; send text in its place."


def _place(loc: Place, values: Any) -> Place:
    """Return where a complaint belongs: its place without pydantic's names of types in it."""
    kept: list[str | int] = []
    for number, part in enumerate(loc):
        if isinstance(values, dict) and (part in values or number == len(loc) - 1):
            if part == "[key]":
                continue
            kept.append(part)
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            kept.append(part)
            values = values[part]
    return tuple(kept)


def _value(place: Place, values: Any) -> tuple[Any, bool]:
    """Return what stands at a place, and whether there is nothing."""
    for part in place:
        if isinstance(values, dict) and part not in values:
            return None, True
        values = values[part]
    return values, False


@cache
def _schema(kind: type[BaseModel]) -> Json:
    return kind.model_json_schema()


def _options(kind: type[BaseModel], place: Place) -> list[Json]:
    """Return the descriptions of what may stand at a place."""
    root = _schema(kind)
    options = list(_flat(root, root))
    for part in place:
        inner: list[Json] = []
        for option in options:
            if isinstance(part, int):
                found = option.get("items")
            else:
                others = [*option.get("patternProperties", {}).values()]
                others.append(option.get("additionalProperties"))
                found = option.get("properties", {}).get(part, others[0])
            if isinstance(found, dict):
                inner += _flat(found, root)
        options = inner
    return options


def _flat(schema: Json, root: Json) -> Iterable[Json]:
    """Give a description's alternatives, references followed."""
    if "$ref" in schema:
        yield from _flat(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    elif inner := schema.get("anyOf") or schema.get("oneOf"):
        for one in inner:
            yield from _flat(one, root)
    elif "enum" in schema:
        for value in schema["enum"]:
            yield {"const": value}
    elif schema.get("type") != "null":
        yield schema


def _words(options: Sequence[Json]) -> str:
    """Return in words what may stand somewhere."""
    words = list(dict.fromkeys(_word(option) for option in options))
    if not words:
        return "left out"
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _word(option: Json) -> str:
    if "const" in option:
        return repr(option["const"])
    kind = option.get("type")
    if kind in ("integer", "number"):
        low = option.get("minimum", option.get("exclusiveMinimum"))
        whole = "a whole number" if kind == "integer" else "a number"
        return whole + _range(low, option.get("maximum"))
    if kind == "string":
        size = _range(option.get("minLength"), option.get("maxLength"), "characters")
        return f"text{size}"
    if kind == "boolean":
        return "true or false"
    if kind == "array":
        return f"a list{_range(option.get('minItems'), option.get('maxItems'), 'entries')}"
    return "an object" if kind == "object" else "any JSON"


def _range(low: float | None, high: float | None, what: str = "") -> str:
    """Return bounds in words, of a number or of how many of something there may be."""
    what = f" {what}" if what else ""
    if high is not None and (high < _LARGE or (low is not None and low < -_LARGE)):
        if low is None:
            return f" of at most {high:g}{what}"
        return f" of {low:g} to {high:g}{what}" if what else f" from {low} to {high}"
    return f" of at least {low:g}{what}" if low else ""


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
