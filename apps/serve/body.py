"""A request's JSON, read within limits and without the parts of JSON that are not JSON.

Python's parser takes NaN, Infinity and lone surrogates, and gives up on deep nesting by exhausting the
stack. Here all of these are bad requests.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from .errors import ApiError, invalid
from .limits import MAX_DEPTH, MAX_DIGITS, Limits


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Raises:
        ApiError: another content type, too large, too slow, not JSON, or no object.
        ClientDisconnect: the client is gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the request must be JSON, with Content-Type: application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed requests are not accepted; send plain JSON.")
    try:
        data = await asyncio.wait_for(
            _read(request, limits.max_body_bytes), limits.body_time_limit_s
        )
    except asyncio.TimeoutError:
        raise ApiError(
            408,
            f"the request was not complete within {limits.body_time_limit_s:g} s.",
            headers={"Connection": "close"},
        ) from None
    return parse_json(data)


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise _too_large(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the request is larger than {limit} bytes; send less, or start the server with a "
        "larger --max-body-bytes.",
        headers={"Connection": "close"},
    )


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object that `data` is.

    Raises:
        ApiError: it is none.
    """
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except UnicodeDecodeError:
        raise invalid("the request is not UTF-8 text.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # JSONDecodeError and our own
        raise invalid(f"the request is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise invalid("the request must be a JSON object.")
    _check(value)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer has more than {MAX_DIGITS} digits")
    return int(text)


def _check(value: object) -> None:
    """Refuse nesting beyond `MAX_DEPTH` and strings that are no text, level by level."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.keys()
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str) and not _is_text(one):
                raise invalid("a string holds a lone surrogate, which is no Unicode text.")
        if not inner:
            return
        level = inner
    raise _too_deep()


def _is_text(string: str) -> bool:
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_deep() -> ApiError:
    return invalid(f"the request is nested deeper than {MAX_DEPTH} levels.")


__all__ = ["ClientDisconnect", "parse_json", "read_json"]
