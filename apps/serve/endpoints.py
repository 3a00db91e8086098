"""The API's endpoints: a request in, a response out, errors as OpenAI words them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...generation.grammar import Grammar
from .answering import Answering, StreamedAnswer, WholeAnswer
from .body import read_json
from .errors import ApiError, invalid
from .limits import MAX_CHOICES
from .openapi import description
from .replies import Reply, choices_for
from .schema import ChatRequest, CompletionRequest, Sampling, parsed_chat, parsed_completion
from .service import READING, Service
from .tool_calls import CallReader


class Endpoints:
    """What the routes call, for one service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def chat(self, request: Request) -> Any:
        """Answer POST /v1/chat/completions."""
        return await self._admitted(request, self._chat)

    async def completion(self, request: Request) -> Any:
        """Answer POST /v1/completions."""
        return await self._admitted(request, self._completion)

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
        service = self.service
        wanted = parsed_chat(await read_json(request, service.limits))
        service.check_model(wanted.model)
        if wanted.top_logprobs is not None and not wanted.logprobs:
            raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
        ids = await service.encode(partial(service.encoder.chat, wanted))
        grammar = await service.encode(partial(service.encoder.grammar, wanted))
        return self._answer(wanted, [ids], arrived, grammar)

    async def _completion(self, request: Request, arrived: float) -> Any:
        service = self.service
        wanted = parsed_completion(await read_json(request, service.limits))
        service.check_model(wanted.model)
        prompts = await service.encode(partial(service.encoder.completion, wanted))
        return self._answer(wanted, prompts, arrived)

    def _answer(
        self,
        wanted: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        arrived: float,
        grammar: Grammar | None = None,
    ) -> Any:
        """Submit a request's answers and return the response that will hold them."""
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
        reply = Reply(
            kind="chat" if isinstance(wanted, ChatRequest) else "completion",
            model=service.model_name,
            choices=choices_for(
                [len(ids) for ids in prompts], n, [self._reader(wanted) for _ in range(count)]
            ),
            logprobs=settings[0].logprobs is not None,
            draft_details=bool(wanted.draft_details),
            include_usage=bool(wanted.stream_options and wanted.stream_options.include_usage),
        )
        answering = Answering(service, reply, prompts, settings, arrived)
        return StreamedAnswer(answering) if wanted.stream else WholeAnswer(answering)

    def _reader(self, wanted: Sampling) -> CallReader | None:
        """Return what finds calls in an answer, where tools were offered and the model knows how."""
        form = self.service.encoder.tools
        if form is None or not isinstance(wanted, ChatRequest):
            return None
        if not wanted.tools or wanted.tool_choice == "none":
            return None
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
