"""The description at /openapi.json, made from the models that check the requests."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from ... import __version__
from .messages.request import MessageRequest
from .responses.request import ResponseRequest
from .schema import ChatRequest, CompletionRequest

Json = dict[str, Any]

_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MODEL: Json = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "context_length": {"type": ["integer", "null"]},
        "streams": {"type": ["string", "null"]},
        "num_streams": {"type": "integer"},
        "mode": {"enum": ["lossless", "shared", "plain"]},
    },
}
_MODELS: Json = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
    },
}
_USAGE: Json = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        "prompt_tokens": {"type": "integer"},
        "completion_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "prompt_tokens_details": {
            "type": "object",
            "properties": {"cached_tokens": {"type": "integer"}},
        },
        "completion_tokens_details": {
            "type": "object",
            "properties": {
                "accepted_prediction_tokens": {"type": "integer"},
                "rejected_prediction_tokens": {"type": "integer"},
            },
        },
    },
}
_TEXT: Json = {"type": "string"}
_ITEMS: Json = {"type": "array", "items": {"type": "object", "required": ["type"]}}


def _object(required: str, **properties: Json) -> Json:
    return {"type": "object", "required": required.split(), "properties": properties}


_ANTHROPIC_ERROR = _object(
    "type error",
    type={"const": "error"},
    error=_object("type message", type=_TEXT, message=_TEXT),
)
_RESPONSE = _object(
    "id object created_at status model output usage",
    id=_TEXT,
    object={"const": "response"},
    created_at={"type": "integer"},
    status={"enum": ["completed", "incomplete"]},
    model=_TEXT,
    output=_ITEMS,
    usage={"type": "object"},
)
_MESSAGE = _object(
    "id type role model content stop_reason usage",
    id=_TEXT,
    type={"const": "message"},
    role={"const": "assistant"},
    model=_TEXT,
    content=_ITEMS,
    stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
    stop_sequence={"type": ["string", "null"]},
    usage={"type": "object"},
)
_DELETED = _object("id object deleted", deleted={"const": True})
_TOKENS = _object("input_tokens", input_tokens={"type": "integer"})
_STATUSES = {
    400: "The request makes no sense; `param` names the field.",
    401: "The server needs its API key.",
    403: "The Host or Origin header is not allowed.",
    404: "There is no such page, model or response.",
    405: "The method does not fit the path.",
    408: "The request was not complete in time.",
    413: "The request is too large.",
    415: "The request is not JSON.",
    429: "The queue is full; `Retry-After` says when to try again.",
    500: "The model failed.",
    503: "The server is closing or too busy.",
}
_ALWAYS = (400, 401, 403, 404, 405)


@cache
def description() -> Json:
    """Return the OpenAPI 3.1 description of the server."""
    _, schemas = models_json_schema(
        [
            (kind, "validation")
            for kind in (ChatRequest, CompletionRequest, ResponseRequest, MessageRequest)
        ],
        ref_template="#/components/schemas/{model}",
    )
    components = {
        **schemas["$defs"],
        "Error": _ERROR,
        "AnthropicError": _ANTHROPIC_ERROR,
        "Response": _RESPONSE,
        "Message": _MESSAGE,
        "Deleted": _DELETED,
        "Tokens": _TOKENS,
        "Model": _MODEL,
        "Models": _MODELS,
        "Usage": _USAGE,
        "ChatCompletion": _reply("chat.completion", {"message": {"type": "object"}}),
        "Completion": _reply("text_completion", {"text": {"type": "string"}}),
    }
    chunks, named = "Chunks of the answer, then [DONE].", "Events, named by their type."
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-specstream",
            "version": __version__,
            "description": (
                "A server with Speculative Streaming, for clients of OpenAI's APIs and of "
                "Anthropic's Messages API."
            ),
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _post("Answer a chat", "ChatRequest", "ChatCompletion", chunks)
            },
            "/v1/completions": {
                "post": _post("Continue texts", "CompletionRequest", "Completion", chunks)
            },
            "/v1/responses": {
                "post": _post(
                    "Answer by OpenAI's Responses API", "ResponseRequest", "Response", named
                )
            },
            "/v1/responses/{id}": {
                "get": _get("Return a stored response", "Response"),
                "delete": _get("Forget a stored response", "Deleted"),
                "parameters": [_in_path("id")],
            },
            "/v1/messages": {
                "post": _post(
                    "Answer by Anthropic's Messages API",
                    "MessageRequest",
                    "Message",
                    named,
                    "AnthropicError",
                )
            },
            "/v1/messages/count_tokens": {
                "post": _post(
                    "Count a message's tokens", "MessageRequest", "Tokens", None, "AnthropicError"
                )
            },
            "/v1/embeddings": {
                "post": {
                    "summary": "Always refused: this server has no embeddings",
                    "responses": _errors(*_ALWAYS),
                }
            },
            "/v1/models": {"get": _get("List the served model", "Models")},
            "/v1/models/{name}": {
                "get": _get("Describe the served model", "Model"),
                "parameters": [_in_path("name")],
            },
            "/health": {"get": _get("Tell whether answers are generated", None, (503,))},
            "/metrics": {"get": _get("Figures for Prometheus", "text/plain")},
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _reply(name: str, content: Json) -> Json:
    choice = {
        "type": "object",
        "required": ["index", "finish_reason", "logprobs", *content],
        "properties": {
            "index": {"type": "integer"},
            "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
            "logprobs": {"type": ["object", "null"]},
            **content,
        },
    }
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": name},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": choice},
            "usage": {"$ref": "#/components/schemas/Usage"},
        },
    }


def _in_path(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _post(summary: str, request: str, reply: str, stream: str | None, error: str = "Error") -> Json:
    """Return what a request is answered with; `stream`: what it holds if there is one."""
    content: Json = {"application/json": {"schema": _ref(reply)}}
    if stream is not None:
        content["text/event-stream"] = {"schema": {"description": stream}}
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(request)}},
        },
        "responses": {
            "200": {
                "description": "The answer; with `stream` as server-sent events.",
                "content": content,
            },
            **_errors(*_ALWAYS, 408, 413, 415, 429, 500, 503, kind=error),
        },
    }


def _get(summary: str, reply: str | None, further: tuple[int, ...] = ()) -> Json:
    if reply == "text/plain":
        content: Json = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {
            "application/json": {"schema": {"type": "object"} if reply is None else _ref(reply)}
        }
    return {
        "summary": summary,
        "responses": {
            "200": {"description": summary, "content": content},
            **_errors(*_ALWAYS),
            **{
                str(status): {"description": _STATUSES[status], "content": content}
                for status in further
            },
        },
    }


def _errors(*statuses: int, kind: str = "Error") -> Json:
    content = {"application/json": {"schema": _ref(kind)}}
    return {
        str(status): {"description": _STATUSES[status], "content": content} for status in statuses
    }


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
