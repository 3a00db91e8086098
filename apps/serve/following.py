"""Serving with several processes: the leader has the clients, the others decode along.

Whatever the leader's engine asks of its scheduler, it first tells the others, in this order and no
other, so that all run the same passes:

    leader     begin(request)   step()   step()   end(request)
                     │             │        │         │
    followers  begin(same)      step()   step()   end(same)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from math import inf
from typing import TYPE_CHECKING, Any

from ...config import SamplingConfig
from ...exit_status import end_if_lost
from ...generation.grammar import Grammar
from ...machine import ranks
from ..thinking import ThoughtMarks
from .request import Event, Request
from .scheduler import Scheduler
from .settings import Settings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("mlx_specstream")

# What is told in another form than its own.
_APART = ("sampling", "grammar", "thoughts", "stop", "stop_token_ids")


class Leading:
    """The leader's `Decoding`: tells the other processes, then does it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.numbers: dict[Request, int] = {}
        self._count = 0

    @property
    def requests(self) -> Sequence[Request]:
        """Return the answers under way."""
        return self.scheduler.requests

    def begin(self, request: Request) -> None:
        """Take an answer on."""
        self._count += 1
        self.numbers[request] = self._count
        _tell("begin", self._count, **_described(request))
        self.scheduler.begin(request)

    def end(self, request: Request) -> None:
        """Let go of an answer."""
        _tell("end", self.numbers.pop(request))
        self.scheduler.end(request)

    def step(self) -> list[tuple[Request, Event]]:
        """Advance."""
        _tell("step")
        return self.scheduler.step()

    def stop(self) -> None:
        """Let the other processes end."""
        _tell("stop")


def follow(scheduler: Scheduler) -> None:
    """Do what the leader's engine asks, until it stops."""
    requests: dict[int, Request] = {}
    while True:
        told: dict[str, Any] = json.loads(ranks.told())
        asked, number = told["asked"], told["number"]
        if asked == "stop":
            return
        try:
            if asked == "begin":
                request = _request(told, scheduler.tokenizer)
                scheduler.begin(request)
                requests[number] = request
            elif asked == "end":
                scheduler.end(requests.pop(number))
            else:
                scheduler.step()
        except Exception as error:  # it has failed for the leader too, which tells its client
            end_if_lost(error)
            log.debug("failed in process %d", ranks.rank(), exc_info=True)


def _tell(asked: str, number: int = 0, **rest: Any) -> None:
    ranks.told(json.dumps({"asked": asked, "number": number, **rest}).encode())


def _described(request: Request) -> dict[str, Any]:
    """Return all of a request that its tokens depend on, as JSON holds it."""
    settings = request.settings
    plain = {
        field.name: getattr(settings, field.name)
        for field in fields(Settings)
        if field.name not in _APART
    }
    return {
        "prompt": request.prompt,
        "shared": request.shared,
        "settings": plain,
        "sampling": asdict(settings.sampling),
        "stop": list(settings.stop),
        "stop_token_ids": sorted(settings.stop_token_ids),
        "grammar": None if settings.grammar is None else settings.grammar.source,
        "grammar_vocab": 0 if settings.grammar is None else settings.grammar.vocab_size,
        "thoughts": settings.thoughts is not None,
    }


def _request(told: dict[str, Any], tokenizer: TokenizerWrapper) -> Request:
    """Return the request that `_described` told of; nobody here waits for its answer."""
    sampling = dict(told["sampling"])
    bias = sampling.get("logit_bias")
    if bias:  # JSON's keys are strings
        sampling["logit_bias"] = {int(token): value for token, value in bias.items()}
    grammar = told["grammar"]
    settings = Settings(
        **told["settings"],
        sampling=SamplingConfig(**sampling),
        stop=tuple(told["stop"]),
        stop_token_ids=frozenset(told["stop_token_ids"]),
        grammar=None if grammar is None else Grammar(tokenizer, grammar, told["grammar_vocab"]),
        thoughts=ThoughtMarks.of(tokenizer) if told["thoughts"] else None,
    )
    return Request(told["prompt"], settings, lambda _: None, inf, shared=told["shared"])
