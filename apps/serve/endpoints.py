"""The APIs' endpoints: a request in, a response out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...generation.grammar import Grammar
from ..thinking import ThoughtSplitter
from .answering import Answering, StreamedAnswer, WholeAnswer
from .body import read_json
from .errors import ApiError, invalid
from .limits import MAX_CHOICES
from .messages.reply import MessageReply
from .messages.request import NAMES as MESSAGE_NAMES
from .messages.request import parsed_message
from .openapi import description
from .replies import CompletionReply, Reply, choices_for
from .responses.reply import ResponseReply
from .responses.request import NAMES as RESPONSE_NAMES
from .responses.request import parsed_response
from .responses.store import ResponseStore
from .schema import ChatRequest, CompletionRequest, Sampling, parsed_chat, parsed_completion
from .service import READING, Service
from .tool_calls import CallReader

MakeReply = Callable[..., Reply]  # takes model= and choices=


class Endpoints:
    """What the routes call, for one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.stored = ResponseStore()

    async def chat(self, request: Request) -> Any:
        """Answer POST /v1/chat/completions."""
        return await self._admitted(request, self._chat)

    async def completion(self, request: Request) -> Any:
        """Answer POST /v1/completions."""
        return await self._admitted(request, self._completion)

    async def responses(self, request: Request) -> Any:
        """Answer POST /v1/responses."""
        return await self._admitted(request, self._respond)

    async def stored_response(self, request: Request) -> Response:
        """Answer GET and DELETE of /v1/responses/ID."""
        name = request.path_params["id"]
        if request.method == "DELETE":
            self.stored.delete(name)
            return JSONResponse({"id": name, "object": "response", "deleted": True})
        if request.query_params.get("stream", "false") != "false":
            raise invalid(
                "stream: a response that is over is not streamed; leave it out.", "stream"
            )
        return JSONResponse(self.stored.get(name))

    async def messages(self, request: Request) -> Any:
        """Answer POST /v1/messages."""
        return await self._admitted(request, self._message)

    async def count_tokens(self, request: Request) -> Any:
        """Answer POST /v1/messages/count_tokens."""
        return await self._admitted(request, self._count)

    async def embeddings(self, request: Request) -> Response:
        """Refuse POST /v1/embeddings."""
        del request
        raise ApiError(
            404,
            "this server generates text and has no embeddings; run a server with an embedding "
            "model beside it, such as llama.cpp's `llama-server --embeddings`, and send these "
            "requests there.",
            code="embeddings_not_supported",
        )

    async def models(self, request: Request) -> Response:
        """Answer GET /v1/models."""
        del request
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Answer GET /v1/models/NAME."""
        self.service.check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """Answer GET /health."""
        del request
        healthy = self.service.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "closing"}, 200 if healthy else 503)

    async def metrics(self, request: Request) -> Response:
        """Answer GET /metrics."""
        del request
        return Response(
            self.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def openapi(self, request: Request) -> Response:
        """Answer GET /openapi.json."""
        del request
        return JSONResponse(description())

    async def _admitted(self, request: Request, answer: Any) -> Any:
        """Answer, unless too many requests are being read already."""
        service = self.service
        if service.reading >= READING:
            raise ApiError(
                429,
                "too many requests are being read at once; try again in a second.",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        service.reading += 1
        try:
            return await answer(request, time.monotonic())
        finally:
            service.reading -= 1

    async def _chat(self, request: Request, arrived: float) -> Any:
        wanted = parsed_chat(await read_json(request, self.service.limits))
        return await self._chat_answer(request, wanted, arrived, partial(_completion_reply, wanted))

    async def _chat_answer(
        self,
        request: Request,
        wanted: ChatRequest,
        arrived: float,
        make: MakeReply,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        """Answer a chat in the form of the API that `make` and `names`, of its fields, belong to."""
        service = self.service
        try:
            service.check_model(wanted.model)
            ids = await service.encode(
                request.receive, lambda encoder: encoder.chat(wanted), wanted.is_long
            )
            grammar = None
            if wanted.may_need_grammar:
                grammar = await service.encode(
                    request.receive, lambda encoder: encoder.grammar(wanted, ids), True
                )
            return self._answer(wanted, [ids], arrived, make, grammar)
        except ApiError as error:
            raise error.renamed(names) from error

    async def _respond(self, request: Request, arrived: float) -> Any:
        asked = parsed_response(await read_json(request, self.service.limits), self.stored)
        make = partial(
            ResponseReply, asked=asked, store=self.stored, defaults=self.service.defaults
        )
        return await self._chat_answer(request, asked.chat, arrived, make, RESPONSE_NAMES)

    async def _message(self, request: Request, arrived: float) -> Any:
        wanted = parsed_message(await read_json(request, self.service.limits))
        return await self._chat_answer(request, wanted, arrived, MessageReply, MESSAGE_NAMES)

    async def _count(self, request: Request, arrived: float) -> Response:
        del arrived
        service = self.service
        wanted = parsed_message(await read_json(request, service.limits), counting=True)
        service.check_model(wanted.model)
        ids = await service.encode(
            request.receive, lambda encoder: encoder.chat(wanted), wanted.is_long
        )
        return JSONResponse({"input_tokens": len(ids)})

    async def _completion(self, request: Request, arrived: float) -> Any:
        service = self.service
        wanted = parsed_completion(await read_json(request, service.limits))
        service.check_model(wanted.model)
        prompts = await service.encode(
            request.receive, lambda encoder: encoder.completion(wanted), wanted.is_long
        )
        lengths = None
        if wanted.alternatives is not None:
            lengths = await service.encode(
                request.receive, lambda encoder: encoder.text_lengths(wanted), wanted.is_long
            )
        make = partial(_completion_reply, wanted)
        return self._answer(wanted, prompts, arrived, make, lengths=lengths)

    def _answer(
        self,
        wanted: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        arrived: float,
        make: MakeReply,
        grammar: Grammar | None = None,
        lengths: list[int] | None = None,
    ) -> Any:
        """Submit a request's answers and return the response that will hold them.

        lengths: of the prompts in characters, where the answer is to tell offsets.
        """
        service, n = self.service, wanted.n or 1
        count = len(prompts) * n
        if count > MAX_CHOICES:
            raise invalid(
                f"{len(prompts)} prompts with n = {n} make {count} answers; a request may ask "
                f"for {MAX_CHOICES}.",
                "n",
            )
        settings = [
            service.settings(wanted, len(prompts[place // n]), place, grammar)
            for place in range(count)
        ]
        marks = None
        if not isinstance(wanted, ChatRequest) or wanted.continue_final_message:
            settings = [replace(one, continues=True) for one in settings]
        if isinstance(wanted, ChatRequest):
            marks = service.encoder.thoughts
            if not wanted.stop_in_reasoning:
                settings = [replace(one, thoughts=marks) for one in settings]
        choices = choices_for(
            [len(ids) for ids in prompts],
            n,
            [self._reader(wanted) for _ in range(count)],
            [ThoughtSplitter.after(marks, prompts[place // n]) for place in range(count)],
        )
        if lengths is not None:
            for choice in choices:
                choice.prompt_length = lengths[choice.index // n]
        reply = make(model=service.model_name, choices=choices)
        answering = Answering(service, reply, prompts, settings, arrived)
        return StreamedAnswer(answering) if wanted.stream else WholeAnswer(answering)

    def _reader(self, wanted: Sampling) -> CallReader | None:
        """Return what finds calls in an answer, where tools were offered and the model knows how."""
        form = self.service.encoder.tools
        if form is None or not isinstance(wanted, ChatRequest):
            return None
        if not wanted.tools or wanted.tool_choice == "none":
            return None
        form = form.within_time(self.service.calls)
        return CallReader(form, [tool.model_dump(exclude_none=True) for tool in wanted.tools])

    def _model(self) -> dict[str, object]:
        service = self.service
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "mlx-specstream",
            "context_length": service.context_length,
            "streams": service.streams_name or None,
            "num_streams": service.num_streams,
            "mode": service.mode,
        }


def _completion_reply(wanted: ChatRequest | CompletionRequest, **common: Any) -> CompletionReply:
    chat = isinstance(wanted, ChatRequest)
    return CompletionReply(
        **common,
        kind="chat" if chat else "completion",
        logprobs=wanted.alternatives is not None,
        draft_details=bool(wanted.draft_details),
        include_usage=bool(wanted.stream_options and wanted.stream_options.include_usage),
    )
