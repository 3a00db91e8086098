"""Variables for a chat template, as command lines give them."""

from __future__ import annotations

import json
from typing import Any

from ..errors import OptionError


def template_args(text: str | None, option: str) -> dict[str, Any]:
    """Return the variables that a JSON object names, none for None.

    Raises:
        OptionError: it is no JSON object; `option` is named.
    """
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise OptionError(f"{option} must be a JSON object like '{{\"key\": true}}', got {text!r}.")
    return values
