"""Errors as clients expect them: a status and OpenAI's `{"error": {...}}` or Anthropic's form of it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.responses import JSONResponse

CONTEXT_EXCEEDED = "context_length_exceeded"
NO_THREADS = "thread_unsupported_request"  # Anthropic's clients then send the whole conversation
ANTHROPIC = "/v1/messages"  # what lies there has Anthropic's errors
# Their words for what went wrong, by status.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = {**_TYPES, 413: "request_too_large", 500: "api_error", 503: "overloaded_error"}


class ApiError(Exception):
    """A request that cannot be answered: status, sentence, and which field was wrong if one was."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, path: str = "") -> dict[str, object]:
        """Return the JSON form for clients of `path`."""
        if path.startswith(ANTHROPIC):
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
            long = (
                self.code == CONTEXT_EXCEEDED
            )  # clients that shorten by themselves look for this:
            message = f"prompt is too long: {self.message}" if long else self.message
            error: dict[str, object] = {"type": kind, "message": message}
            if self.code == NO_THREADS:
                error["details"] = {"error_code": NO_THREADS}
            return {"type": "error", "error": error}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self, path: str = "") -> JSONResponse:
        """Return the HTTP answer to a client of `path`."""
        return JSONResponse(self.body(path), self.status, self.headers)

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """Return the error of a request in whose API some fields have other names."""
        name = names.get(self.param or "")
        if name is None:
            return self
        message = re.sub(rf"^{self.param}(?=\W)", name, self.message)
        return ApiError(self.status, message, param=name, code=self.code, headers=self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that makes no sense."""
    return ApiError(400, message, param=param, code=code)
