"""An answer as a response: items of output, whole or as the events that build them.

response.created, response.in_progress
response.output_item.added              a message, a call or a thought begins
response.content_part.added             its text
response.output_text.delta ...
response.output_text.done
response.content_part.done
response.output_item.done
response.completed                        or .incomplete, .failed
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ....config import SamplingConfig
from ..blocks import Block, Blocks, Step
from ..errors import ApiError
from ..messages_schema import Strict
from ..replies import Choice, Delta, Json, Reply, logprobs_of
from .request import Asked
from .store import ResponseStore


@dataclass(frozen=True)
class _Form:
    """What events call a text, its part and its place."""

    part: str
    text: str
    index: str
    kind: str


_TEXT = _Form("content", "output_text", "content_index", "output_text")
_THOUGHT = _Form("content", "reasoning_text", "content_index", "reasoning_text")
_SUMMARY = _Form("reasoning_summary", "reasoning_summary_text", "summary_index", "summary_text")
_PREFIXES = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}


@dataclass(kw_only=True)
class ResponseReply(Reply):
    """One response, with what was `asked`; kept in `store` when it is over, if wanted."""

    asked: Asked
    store: ResponseStore
    defaults: SamplingConfig
    blocks: Blocks = field(default_factory=Blocks)
    sent: int = 0  # events

    def whole(self) -> Json:
        status = "incomplete" if self._finish == "length" else "completed"
        response = self._response(status)
        if response["store"]:
            self.store.put(response, self.asked.items)
        return response

    def first_chunks(self) -> list[Json]:
        return [
            self._event(f"response.{name}", response=self._response("in_progress"))
            for name in ("created", "in_progress")
        ]

    def chunks(self, choice: Choice, delta: Delta) -> list[Json]:
        del choice  # there is but one
        return [event for step in self.blocks.add(delta) for event in self._events(step)]

    def last_chunks(self) -> list[Json]:
        response = self.whole()
        return [self._event(f"response.{response['status']}", response=response)]

    def failure(self, error: ApiError) -> list[Json]:
        code = {400: "invalid_prompt", 429: "rate_limit_exceeded"}.get(error.status, "server_error")
        response = self._response("failed")
        response["error"] = {"code": code, "message": error.message}
        return [
            self._event("error", code=code, message=error.message, param=error.param),
            self._event("response.failed", response=response),
        ]

    @property
    def _finish(self) -> str | None:
        return self.choices[0].finish_reason

    def _event(self, name: str, /, **fields: Any) -> Json:
        self.sent += 1
        return {"type": name, "sequence_number": self.sent - 1, **fields}

    def _events(self, step: Step) -> list[Json]:
        """Return what a step of a block is to a client."""
        block = step.block
        place: Json = {"item_id": self._id(block), "output_index": block.index}
        if block.call is not None:
            name, inner = "response.function_call_arguments", []
            last: Json = {"name": block.call.name, "arguments": block.text}
        else:
            form = self._form(block)
            name = f"response.{form.text}"
            inner = [f"response.{form.part}_part"]
            place[form.index] = 0
            last = {"text": block.text, **self._logprobs(block)}
        if step.kind == "grow":
            delta = {"delta": step.text, **self._logprobs(step)}
            return [self._event(f"{name}.delta", **place, **delta)]
        item = {"output_index": block.index, "item": self._item(block)}
        if step.kind == "open":
            return [
                self._event("response.output_item.added", **item),
                *(self._event(f"{one}.added", **place, part=self._part(block)) for one in inner),
            ]
        return [
            self._event(f"{name}.done", **place, **last),
            *(self._event(f"{one}.done", **place, part=self._part(block)) for one in inner),
            self._event("response.output_item.done", **item),
        ]

    def _id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}{self.id}_{block.index}"

    def _form(self, block: Block) -> _Form:
        if block.kind == "text":
            return _TEXT
        reasoning = self.asked.fields.reasoning
        return _SUMMARY if reasoning and reasoning.summary else _THOUGHT

    def _part(self, block: Block) -> Json:
        part: Json = {"type": self._form(block).kind, "text": block.text}
        if block.kind == "text":
            part |= {"annotations": [], "logprobs": logprobs_of(block.pieces)}
        return part

    def _logprobs(self, of: Block | Step) -> Json:
        block = of.block if isinstance(of, Step) else of
        return {"logprobs": logprobs_of(of.pieces)} if block.kind == "text" else {}

    def _item(self, block: Block) -> Json:
        """Return an item of the output as far as it is written."""
        cut = self._finish == "length" and block is self.blocks.made[-1] and block.call is None
        status = "in_progress" if not block.whole else "incomplete" if cut else "completed"
        item: Json = {"id": self._id(block), "status": status}
        if block.call is not None:
            call = {"call_id": block.call.id, "name": block.call.name, "arguments": block.text}
            return {**item, "type": "function_call", **call}
        parts = [self._part(block)] if block.text or block.whole else []
        if block.kind == "text":
            return {**item, "type": "message", "role": "assistant", "content": parts}
        both: Json = {"summary": [], "content": []}
        both["summary" if self._form(block) is _SUMMARY else "content"] = parts
        return {**item, "type": "reasoning", **both, "encrypted_content": None}

    def _response(self, status: str) -> Json:
        """Return the response in a status, with what was asked for."""
        fields, over = self.asked.fields, status in ("completed", "incomplete")
        usage = self.usage()
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": None,
            "model": self.model,
            "output": [self._item(block) for block in self.blocks.made],
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": fields.previous_response_id or None,
            "reasoning": _dumped(fields.reasoning) or {"effort": None, "summary": None},
            "service_tier": "default",
            "store": fields.store is not False,
            "temperature": _given(fields.temperature, self.defaults.temp),
            "text": _dumped(fields.text) or {"format": {"type": "text"}},
            "tool_choice": fields.tool_choice or "auto",
            "tools": fields.tools or [],
            "top_logprobs": fields.top_logprobs or 0,
            "top_p": _given(fields.top_p, self.defaults.top_p),
            "truncation": fields.truncation or "disabled",
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            }
            if over
            else None,
            "user": fields.user,
            "metadata": fields.metadata or {},
        }


def _dumped(options: Strict | None) -> Json | None:
    return None if options is None else options.model_dump(by_alias=True)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
