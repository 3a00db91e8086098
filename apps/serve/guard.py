"""Who may ask: an ASGI layer in front of everything else.

A web page from anywhere can make a browser send requests to this machine. What it cannot do is
choose their Host and Origin headers:

* Host must be localhost, an IP address, or an allowed name. A page whose own name was made to
  point here (DNS rebinding) sends that name.
* Origin, if there is one, must be this server itself or an allowed one. A page from elsewhere
  sends where it is from.

With a key, everything but the page itself, /health and the description asks for it.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .limits import Access
from .page_files import PAGE_FILES

OPEN_PATHS = frozenset({*PAGE_FILES, "/favicon.ico", "/health", "/openapi.json"})  # without a key
# A web page may send these; the last three are what Anthropic's client adds.
_ALLOWED_HEADERS = (
    *("Authorization", "Content-Type", "X-API-Key"),
    *("Anthropic-Version", "Anthropic-Beta", "Anthropic-Dangerous-Direct-Browser-Access"),
)


class Guard:
    """Lets through what `access` allows and answers the rest with 400, 401 or 403."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.hosts = {"localhost", *(name.lower().rstrip(".") for name in access.allowed_hosts)}
        self.origins = {origin.lower().rstrip("/") for origin in access.allowed_origins}
        self.key = None if access.api_key is None else access.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if "expect" in headers:
            receive, send = _closing_unread(receive, send)
        try:
            _check_framing(scope, headers)
            host = self._host(headers)
            foreign = self._foreign_origin(scope, headers, host)
            if foreign and scope["method"] == "OPTIONS":
                await _preflight(foreign)(scope, receive, send)
                return
            self._check_key(scope, headers)
        except ApiError as error:
            allowed = origin is not None and origin.lower() in self.origins
            response = error.response(scope["path"])
            if allowed and origin is not None:
                _allow(response.headers, origin)
            await response(scope, receive, send)
            return
        await self.app(scope, receive, _allowing(send, foreign) if foreign else send)

    def _host(self, headers: Headers) -> str:
        """Return the Host header if it is one of ours."""
        values = headers.getlist("host")
        if len(values) != 1:
            raise ApiError(400, "the request must have one Host header.")
        name = _host_name(values[0])
        if name is None or not (name in self.hosts or _is_address(name)):
            raise ApiError(
                403,
                f"the host {values[0][:100]!r} is not one of this server's; start it with "
                "--allowed-host NAME if it is.",
                code="host_not_allowed",
            )
        return values[0].lower()

    def _foreign_origin(self, scope: Scope, headers: Headers, host: str) -> str | None:
        """Return the allowed origin a web page elsewhere sends; None for our own and no page."""
        origin = headers.get("origin")
        if origin is None:
            # Old habits of browsers (images, scripts) send none, but say where they come from.
            site = headers.get("sec-fetch-site", "none")
            navigation = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
            if site in ("cross-site", "same-site") and not navigation:
                raise _wrong_origin("another web page")
            return None
        if origin.lower() in (f"http://{host}", f"https://{host}"):
            return None
        if origin.lower() in self.origins:
            return origin
        raise _wrong_origin(repr(origin[:100]))

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if self.key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.key):
            raise ApiError(
                401,
                "this server needs its API key: send Authorization: Bearer KEY or X-API-Key: KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _check_framing(scope: Scope, headers: Headers) -> None:
    """Refuse a body whose end two servers may see in two places, and close [RFC 9112 6.1]."""
    if "transfer-encoding" not in headers:
        return
    if "content-length" in headers or scope.get("http_version") == "1.0":
        raise ApiError(
            400,
            "the request's length is ambiguous; send Content-Length, or with HTTP/1.1 chunks.",
            headers={"Connection": "close"},
        )


def _host_name(value: str) -> str | None:
    """Return the name in a Host header, without port and brackets."""
    try:
        parts = urlsplit(f"//{value}")
        _ = parts.port  # raises if it is none
    except ValueError:
        return None
    if parts.netloc != value or "@" in value or not parts.hostname:
        return None
    return parts.hostname.lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _wrong_origin(where: str) -> ApiError:
    return ApiError(
        403,
        f"requests from {where} are not allowed; start the server with --allowed-origin ORIGIN "
        "if they are meant.",
        code="origin_not_allowed",
    )


def _closing_unread(receive: Receive, send: Send) -> tuple[Receive, Send]:
    """Close behind an answer that did not wait for the body.

    A client that asked whether to send it (`Expect: 100-continue`) may leave it out now, and what it
    sends next would be taken for it.
    """
    read = False

    async def receiving() -> Message:
        nonlocal read
        read = True
        return await receive()

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and not read:
            MutableHeaders(scope=message)["Connection"] = "close"
        await send(message)

    return receiving, sending


def _allow(headers: MutableHeaders, origin: str) -> None:
    headers["Access-Control-Allow-Origin"] = origin
    headers["Vary"] = "Origin"


def _preflight(origin: str) -> Response:
    response = Response(status_code=204)
    _allow(response.headers, origin)
    response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
    response.headers["Access-Control-Allow-Headers"] = ", ".join(_ALLOWED_HEADERS)
    response.headers["Access-Control-Max-Age"] = "600"
    return response


def _allowing(send: Send, origin: str) -> Send:
    """Return a `send` that tells the browser that `origin` may read the answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            _allow(MutableHeaders(scope=message), origin)
        await send(message)

    return sending
