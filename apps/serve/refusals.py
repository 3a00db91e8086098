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

    Of a value that may be of several types that one counts which it is closest to.
    """
    found = error.errors(include_url=False, include_input=False)
    root = found[0]["loc"][:1]
    place, worst = _closest([one for one in found if one["loc"][:1] == root], values)
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
    options = _options(kind, place)
    wanted = _TYPES.get(worst["type"])
    if worst["type"] not in _OTHER:
        wanted = _json_type(value)
    kinds = {option.get("type") for option in options if "const" not in option}
    if wanted in kinds and _json_type(value) in kinds:
        # What stands beside it says which of several types is wanted here.
        options = [one for one in options if "const" in one or one.get("type") == wanted]
    allowed = _words(options, value)
    name = ".".join(str(part) for part in (*at, *place)) or "the request"
    if missing:
        return invalid(f"{name} is missing; it must be {allowed}.", param)
    return invalid(f"{name} must be {allowed}, got {_shown(value)}.", param)


# What pydantic says of a value that is of another type, and JSON's name of the one it wants.
_TYPES = {
    "string_type": "string",
    "int_type": "integer",
    "float_type": "number",
    "list_type": "array",
    "dict_type": "object",
    "model_type": "object",
}


def _json_type(value: Any) -> str | None:
    """Return JSON's name of a value's type, None for what may be several."""
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value))


def _closest(found: Sequence[Any], values: object) -> tuple[Place, Any]:
    """Return the complaint that tells most, and its place.

    The innermost of the alternative with the fewest; one whose type is another one comes last.
    """
    groups: dict[Place, list[tuple[Place, Any]]] = {}
    for one in found:
        place, alternative = _place(one["loc"], values, one["type"] == "missing")
        groups.setdefault(alternative, []).append((place, one))

    def rank(alternative: Place) -> tuple[bool, int, bool, int, tuple[int, ...]]:
        group = groups[alternative]
        first, one = group[0]
        other = one["type"] in _OTHER
        outside = alternative != () and len(group) == 1 and len(first) < len(alternative)
        depth = max(len(place) for place, _ in group)
        numbers = tuple(-part for part in first if isinstance(part, int))
        return outside and other, len(group), other, -depth, numbers

    return max(groups[min(groups, key=rank)], key=lambda pair: len(pair[0]))


_OTHER = {*_TYPES, "bool_type", "literal_error", "model_attributes_type"}


def is_media(kind: str) -> bool:
    """Tell whether a part of this type holds something else than text."""
    return any(word in kind for word in _MEDIA)


def no_media(kind: str) -> str:
    """Return why a part of this type is refused."""
    return f"{kind[:100]!r} cannot be read: the model reads text alone; send text in its place."


def _place(loc: Place, values: Any, missing: bool) -> tuple[Place, Place]:
    """Return where a complaint belongs, and which of a value's types it is about, if of several.

    The place is without pydantic's names of types; up to the first of them is the type.
    missing: what is complained of is that there is nothing.
    """
    kept: list[str | int] = []
    alternative: Place = ()
    for number, part in enumerate(loc):
        if isinstance(values, dict) and (part in values or (missing and number == len(loc) - 1)):
            kept.append(part)
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            kept.append(part)
            values = values[part]
        elif part != "[key]":
            alternative = alternative or loc[: number + 1]
    return tuple(kept), alternative


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


def _words(options: Sequence[Json], value: object) -> str:
    """Return in words what may stand where `value` does."""
    words = list(dict.fromkeys(_word(option, value) for option in options))
    if not words:
        return "left out"
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _word(option: Json, value: object) -> str:
    if "const" in option:
        return repr(option["const"])
    kind = option.get("type")
    if kind in ("integer", "number"):
        low = option.get("minimum", option.get("exclusiveMinimum"))
        high = option.get("maximum")
        whole = "a whole number" if kind == "integer" else "a number"
        beyond = isinstance(value, int | float) and high is not None and value > high
        if high is not None and (beyond or high < _LARGE or (low is not None and low < -_LARGE)):
            return f"{whole} from {low} to {high}"
        return whole if low is None else f"{whole} of at least {low}"
    if kind == "string":
        size = _range(option.get("minLength"), option.get("maxLength"), "characters")
        return f"text{size and f' of {size}'}"
    if kind == "boolean":
        return "true or false"
    if kind == "array":
        entries = _ENTRIES.get(option.get("items", {}).get("type"), "entries")
        return f"a list of {_range(option.get('minItems'), option.get('maxItems'), entries)}"
    return "an object" if kind == "object" else "any JSON"


_ENTRIES = {"string": "texts", "integer": "whole numbers", "array": "lists"}


def _range(low: int | None, high: int | None, what: str) -> str:
    """Return in words how many of something there may be, "" for any number of characters."""
    if high is not None and high < _LARGE:
        return f"{f'{low} to' if low else 'at most'} {high} {what}"
    return f"{low} or more {what}" if low else "" if what == "characters" else what


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
