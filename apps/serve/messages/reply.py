"""An answer as a message: blocks of content, whole or as the events that build them.

message_start
content_block_start, content_block_delta ..., content_block_stop    for each block
message_delta       why it ended, and the tokens it took
message_stop
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ..blocks import Block, Blocks, Step
from ..errors import ANTHROPIC, ApiError
from ..replies import Choice, Delta, Json, Reply

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass(kw_only=True)
class MessageReply(Reply):
    """One message of the assistant."""

    blocks: Blocks = field(default_factory=Blocks)

    def whole(self) -> Json:
        content = [_content(block) for block in self.blocks.made]
        return {**self._head(), "content": content, **self._ending(), "usage": self._usage()}

    def first_chunks(self) -> list[Json]:
        # Before anything is read nobody knows what a cache holds; message_delta corrects this.
        ending = {"stop_reason": None, "stop_sequence": None}
        message = {**self._head(), "content": [], **ending, "usage": self._usage()}
        return [{"type": "message_start", "message": message}]

    def chunks(self, choice: Choice, delta: Delta) -> list[Json]:
        del choice  # there is but one
        return [event for step in self.blocks.add(delta) for event in _events(step)]

    def last_chunks(self) -> list[Json]:
        return [
            {"type": "message_delta", "delta": self._ending(), "usage": self._usage()},
            {"type": "message_stop"},
        ]

    def failure(self, error: ApiError) -> list[Json]:
        return [error.body(ANTHROPIC)]

    def _head(self) -> Json:
        common = {"id": f"msg_{self.id}", "type": "message", "role": "assistant"}
        return {**common, "model": self.model}

    def _ending(self) -> Json:
        (choice,) = self.choices
        found = choice.last.stop_string if choice.last and choice.finish_reason == "stop" else None
        reason = "stop_sequence" if found else _REASONS[choice.finish_reason or "stop"]
        return {"stop_reason": reason, "stop_sequence": found}

    def _usage(self) -> Json:
        """Return the tokens; what a cache held is no input to Anthropic."""
        usage = self.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        details = usage["completion_tokens_details"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"thinking_tokens": details["reasoning_tokens"]},
        }


def _content(block: Block) -> Json:
    """Return a block that is over."""
    if block.call is not None:
        return {**_opened(block), "input": json.loads(block.text)}
    return {**_opened(block), _FIELDS[block.kind]: block.text}


def _opened(block: Block) -> Json:
    """Return a block that has just begun."""
    if block.call is not None:
        return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": {}}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


_FIELDS = {"text": "text", "reasoning": "thinking", "call": "partial_json"}
_DELTAS = {"text": "text_delta", "reasoning": "thinking_delta", "call": "input_json_delta"}


def _events(step: Step) -> list[Json]:
    block = step.block
    place: Json = {"index": block.index}
    if step.kind == "open":
        return [{"type": "content_block_start", **place, "content_block": _opened(block)}]
    if step.kind == "close":
        return [{"type": "content_block_stop", **place}]
    if not step.text:
        return []
    delta: Any = {"type": _DELTAS[block.kind], _FIELDS[block.kind]: step.text}
    return [{"type": "content_block_delta", **place, "delta": delta}]
