"""The ASGI application: routes, the guard in front of them, and errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answering import CLIENT_GONE
from .endpoints import Endpoints
from .errors import ApiError
from .guard import Guard
from .limits import Access
from .metrics import Metrics
from .page_files import FOLDER, PAGE_FILES
from .service import Service

# The page may run its own script and style and talk to this server, nothing else.
_CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_COUNTED = {
    "/v1/chat/completions": "chat",
    "/chat/completions": "chat",
    "/v1/completions": "completions",
    "/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/models": "models",
    "/health": "health",
    "/metrics": "metrics",
}


def create_app(service: Service, access: Access) -> ASGIApp:
    """Return the application that serves `service` to whom `access` allows."""
    endpoints = Endpoints(service)
    routes = [
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.completion, methods=["POST"]),
        # For clients whose base URL lacks /v1, as mlx-lm's server has it.
        Route("/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/completions", endpoints.completion, methods=["POST"]),
        Route("/models", endpoints.models),
        Route("/v1/responses", endpoints.responses, methods=["POST"]),
        Route("/v1/responses/{id}", endpoints.stored_response, methods=["GET", "DELETE"]),
        Route("/v1/messages", endpoints.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", endpoints.count_tokens, methods=["POST"]),
        Route("/v1/embeddings", endpoints.embeddings, methods=["POST"]),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/health", endpoints.health),
        Route("/metrics", endpoints.metrics),
        Route("/openapi.json", endpoints.openapi),
        *(Route(path, _page_file(name, kind)) for path, (name, kind) in PAGE_FILES.items()),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _api_error,
        HTTPException: _http_error,
        ClientDisconnect: _gone,
        Exception: _bug,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return _Counted(Guard(app, access), service.metrics)


def _page_file(name: str, kind: str) -> Any:
    content = (FOLDER / name).read_bytes()

    async def served(request: Request) -> Response:
        del request
        return Response(content, headers=_PAGE_HEADERS, media_type=kind)

    return served


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response(request.url.path)


async def _http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path[:200]}; see /openapi.json."
    elif error.status_code == 405:
        message = f"{request.method} does not fit {request.url.path[:200]}; see /openapi.json."
    else:
        message = f"{error.detail}."
    return ApiError(error.status_code, message, headers=error.headers).response(request.url.path)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    del error
    request.scope["specstream.gone"] = True
    return Response(status_code=CLIENT_GONE)


async def _bug(request: Request, error: Exception) -> Response:
    del error  # Starlette raises it again for the log
    message = "the server failed to handle this request."
    return ApiError(500, message).response(request.url.path)


class _Counted:
    """Counts requests by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counting)
        finally:
            if scope.get("specstream.gone"):
                status = CLIENT_GONE
            path = _COUNTED.get(scope["path"], "other")
            self.metrics.requests.labels(path, str(status)).inc()
