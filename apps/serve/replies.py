"""Passes of the model to what clients read, whole or in chunks.

`Reply` is what every API's form of an answer has in common. Here is OpenAI's older form: two kinds,
chat and completion, differ in how a choice looks; all else they share.
"""

from __future__ import annotations

import codecs
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ... import __version__
from ...speculation.statistics import SpeculationStats
from ..thinking import ThoughtSplitter
from .errors import ApiError
from .request import Alternative, Piece, Progress
from .tool_calls import Call, CallReader

Json = dict[str, Any]
FINGERPRINT = f"mlx-specstream-{__version__}"
LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI writes this


@dataclass(frozen=True)
class Run:
    """Text that one token completed, and the stream that proposed it (0: main)."""

    text: str
    origin: int
    is_thought: bool = False


@dataclass
class Delta:
    """What one pass added to a choice; `runs` hold all of its text, calls as they were written."""

    text: str
    calls: list[Call]
    pieces: tuple[Piece, ...]
    finish_reason: str | None
    reasoning: str = ""
    runs: tuple[Run, ...] = ()


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    prompt_tokens: int
    counts_prompt: bool = True  # the first answer to its prompt
    reader: CallReader | None = None
    splitter: ThoughtSplitter = field(default_factory=lambda: ThoughtSplitter(None))
    prompt_length: int = 0  # in characters, where offsets are told
    text: str = ""
    reasoning: str = ""
    reasoning_tokens: int = 0
    calls: list[Call] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # in the text, of the tokens that are told
    runs: list[Run] = field(default_factory=list)
    finish_reason: str | None = None
    last: Progress | None = None
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    told: int = 0  # characters of those tokens

    def take(self, progress: Progress) -> Delta:
        """Take in a pass and return what it added."""
        finish: str | None = progress.finish_reason
        runs = self._runs(progress)
        text = "".join(run.text for run in runs if not run.is_thought)
        reasoning = "".join(run.text for run in runs if run.is_thought)
        calls: list[Call] = []
        if self.reader is not None:
            text, calls = self.reader.feed(text, over=finish is not None)
            if self.reader.found and finish == "stop":
                finish = "tool_calls"
        self.text += text
        self.reasoning += reasoning
        self.calls += calls
        self.pieces += progress.pieces
        for piece in progress.pieces:
            if piece.drawn is not None:
                self.places.append(self.told)
                self.told += len(self.decoder.decode(piece.drawn.data))
        self.runs += runs
        self.finish_reason, self.last = finish, progress
        return Delta(text, calls, progress.pieces, finish, reasoning, tuple(runs))

    def all(self) -> Delta:
        """Return everything so far as one."""
        return Delta(
            self.text,
            self.calls,
            tuple(self.pieces),
            self.finish_reason,
            self.reasoning,
            tuple(self.runs),
        )

    def _runs(self, progress: Progress) -> list[Run]:
        """Return a pass's text as runs of thought or content, at least one per token."""
        runs: list[Run] = []
        for piece in progress.pieces:
            inside = self.splitter.inside
            segments = self.splitter.feed(piece.text)
            if progress.finish_reason is not None and piece is progress.pieces[-1]:
                segments += self.splitter.feed("", over=True)
            inside = inside or self.splitter.inside
            self.reasoning_tokens += inside
            runs += [Run(one.text, piece.origin, one.is_thought) for one in segments] or [
                Run("", piece.origin, inside)
            ]
        return runs

    @property
    def stats(self) -> SpeculationStats:
        """Return the figures so far."""
        return SpeculationStats() if self.last is None else self.last.stats


@dataclass(kw_only=True)
class Reply(ABC):
    """The answer to one request; `chunks` while it grows, `whole` when it is over.

    end: what a stream closes with, behind its last chunk.
    """

    model: str
    choices: list[Choice]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    end: ClassVar[bytes] = b""

    @abstractmethod
    def whole(self) -> Json:
        """Return the complete reply, after `chunks` has seen all passes."""

    @abstractmethod
    def first_chunks(self) -> list[Json]:
        """Return what a stream begins with."""

    @abstractmethod
    def chunks(self, choice: Choice, delta: Delta) -> list[Json]:
        """Return what a pass makes, nothing if there is nothing in it to tell."""

    @abstractmethod
    def last_chunks(self) -> list[Json]:
        """Return what a stream ends with."""

    def failure(self, error: ApiError) -> list[Json]:
        """Return what ends a stream in which an error came up."""
        return [error.body()]

    def usage(self) -> Json:
        """Return the tokens this reply took; a prompt counts once, whatever n."""
        stats = [choice.stats for choice in self.choices]
        counted = [choice for choice in self.choices if choice.counts_prompt]
        prompt = sum(choice.prompt_tokens for choice in counted)
        cached = sum(choice.last.cached_tokens for choice in counted if choice.last is not None)
        completion = sum(one.tokens for one in stats)
        accepted = sum(one.accepted for one in stats)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.reasoning_tokens for choice in self.choices),
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(one.drafted for one in stats) - accepted,
            },
        }


@dataclass(kw_only=True)
class CompletionReply(Reply):
    """A chat's answer, or texts continued."""

    kind: Literal["chat", "completion"]
    logprobs: bool = False
    draft_details: bool = False
    include_usage: bool = False
    end: ClassVar[bytes] = b"data: [DONE]\n\n"

    def whole(self) -> Json:
        made = self._chat_choice if self.kind == "chat" else self._completion_choice
        choices = [made(choice, choice.all()) for choice in self.choices]
        return {**self._head(chunk=False), "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> list[Json]:
        if self.kind == "completion":
            return []
        delta = {"role": "assistant", "content": ""}  # in a chat, who speaks
        return [
            self._chunk(
                [{"index": c.index, "delta": delta, "logprobs": None, "finish_reason": None}]
            )
            for c in self.choices
        ]

    def chunks(self, choice: Choice, delta: Delta) -> list[Json]:
        told = delta.text or delta.reasoning or delta.calls or delta.finish_reason
        if not (told or self.logprobs or self.draft_details):
            return []
        if self.kind == "completion":
            return [self._chunk([self._completion_choice(choice, delta)])]
        return [self._chunk([self._chat_delta(choice, delta)])]

    def last_chunks(self) -> list[Json]:
        if not self.include_usage:
            return []
        return [{**self._head(chunk=True), "choices": [], "usage": self.usage()}]

    def _head(self, *, chunk: bool) -> Json:
        if self.kind == "chat":
            name, prefix = f"chat.completion{'.chunk' if chunk else ''}", "chatcmpl-"
        else:
            name, prefix = "text_completion", "cmpl-"
        return {
            "id": prefix + self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _chunk(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head(chunk=True), "choices": choices, **usage}

    def _chat_choice(self, choice: Choice, delta: Delta) -> Json:
        message: Json = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.reasoning:
            message["reasoning"] = delta.reasoning
        if delta.calls:
            message["content"] = delta.text or None
            message["tool_calls"] = [_call(call) for call in delta.calls]
        return self._ended(choice, delta, {"message": message}, self._chat_logprobs(delta))

    def _chat_delta(self, choice: Choice, delta: Delta) -> Json:
        content: Json = {"content": delta.text} if delta.text else {}
        if delta.reasoning:
            content["reasoning"] = delta.reasoning
        if delta.calls:
            before = len(choice.calls) - len(delta.calls)
            content["tool_calls"] = [
                {"index": before + place, **_call(call)} for place, call in enumerate(delta.calls)
            ]
        return self._ended(choice, delta, {"delta": content}, self._chat_logprobs(delta))

    def _completion_choice(self, choice: Choice, delta: Delta) -> Json:
        logprobs = self._completion_logprobs(choice, delta) if self.logprobs else None
        return self._ended(choice, delta, {"text": delta.text}, logprobs)

    def _ended(self, choice: Choice, delta: Delta, content: Json, logprobs: Json | None) -> Json:
        made = {
            "index": choice.index,
            **content,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        if self.draft_details and choice.last is not None:
            stats = choice.stats
            made["specstream"] = {
                "pieces": [
                    {
                        "text": run.text,
                        "origin": run.origin,
                        **({"thought": True} if run.is_thought else {}),
                    }
                    for run in delta.runs
                ],
                "tokens": stats.tokens,
                "passes": stats.passes,
                "tokens_per_pass": round(stats.tokens_per_step, 3),
                "tokens_per_s": round(choice.last.tokens_per_s, 2),
            }
        return made

    def _chat_logprobs(self, delta: Delta) -> Json | None:
        if not self.logprobs:
            return None
        return {"content": logprobs_of(delta.pieces), "refusal": None}

    def _completion_logprobs(self, choice: Choice, delta: Delta) -> Json:
        drawn = [(piece, piece.drawn) for piece in delta.pieces if piece.drawn is not None]
        places = choice.places[len(choice.places) - len(drawn) :]
        return {
            "tokens": [_spelled(one) for _, one in drawn],
            "token_logprobs": [_finite(one.logprob) for _, one in drawn],
            "top_logprobs": [
                {_spelled(one): _finite(one.logprob) for one in reversed(piece.alternatives)}
                for piece, _ in drawn
            ],
            # As OpenAI counts: from the prompt's beginning, though the prompt is not repeated.
            "text_offset": [choice.prompt_length + place for place in places],
        }


def choices_for(
    prompts: Sequence[int],
    n: int,
    readers: Sequence[CallReader | None],
    splitters: Sequence[ThoughtSplitter] | None = None,
) -> list[Choice]:
    """Return the choices of prompts with so many tokens, n each."""
    choices = [
        Choice(index, prompts[index // n], index % n == 0, readers[index])
        for index in range(len(prompts) * n)
    ]
    for choice, splitter in zip(choices, splitters or (), strict=bool(splitters)):
        choice.splitter = splitter
    return choices


def logprobs_of(pieces: Sequence[Piece]) -> list[Json]:
    """Return the tokens whose log-probabilities are known, as a chat shows them."""
    return [
        {**_ranked(piece.drawn), "top_logprobs": [_ranked(one) for one in piece.alternatives]}
        for piece in pieces
        if piece.drawn is not None
    ]


def _call(call: Call) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _ranked(one: Alternative) -> Json:
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": list(one.data)}


def _spelled(one: Alternative) -> str:
    """Return a token as OpenAI's older API names it: marked where it is part of a character."""
    return f"bytes:{one.text}" if one.is_part else one.text


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
