"""A JSON schema as llguidance is to read it: one line of JSON, without what says nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import DataError, brief

# JSON as `json.dumps` and chat templates write it: a choice of blanks is one that has no end.
_ONE_LINE = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


def schema_text(schema: Mapping[str, Any] | bool | str) -> str:
    """Return a JSON schema as llguidance is to read it, blanks included.

    Raises:
        DataError: it is no JSON schema.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the JSON schema is no JSON: {brief(error)}.") from None
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, Mapping):
        raise DataError(f"a JSON schema must be an object, got {type(schema).__name__}.")
    own = schema.get("x-guidance")
    options = own if isinstance(own, Mapping) else {}
    if not {"whitespace_pattern", "whitespace_flexible"} & set(options):
        options = {**_ONE_LINE, **options}
    return json.dumps({**_known(schema), "x-guidance": options})


# Keywords whose values are schemas by name, or lists of schemas; the others' objects are schemas.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "example", "examples", "required", "x-guidance")


def _known(schema: Any) -> Any:
    """Return a schema without what llguidance does not know and what says nothing.

    Names of properties are texts, which zod's records say all the same.
    """
    if isinstance(schema, list):
        return [_known(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "propertyNames" and value in (True, {}, {"type": "string"}):
            continue
        if key in _BY_NAME and isinstance(value, Mapping):
            found[key] = {name: _known(one) for name, one in value.items()}
        else:
            found[key] = value if key in _VALUES else _known(value)
    return found
