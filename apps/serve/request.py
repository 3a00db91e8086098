"""What the engine is given and what it gives back: the words between event loop and model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ...errors import DataError, OptionError, SpecStreamError
from ...speculation.statistics import SpeculationStats
from .errors import ApiError, invalid
from .settings import Settings

log = logging.getLogger("mlx_specstream")

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Alternative:
    """A token the model could have drawn, its bytes, and its log-probability."""

    token: int
    data: bytes
    logprob: float

    @property
    def text(self) -> str:
        r"""Return the token's text, bytes that are part of a character as \xc3."""
        return self.data.decode("utf-8", "backslashreplace")

    @property
    def is_part(self) -> bool:
        """Tell whether the token's bytes are no text of their own."""
        return self.data.decode("utf-8", "ignore").encode() != self.data


@dataclass(frozen=True)
class Piece:
    """A token, the text it completes (may be empty), and the stream that proposed it (0: main).

    drawn: the token with its log-probability in the distribution it was drawn from, and
    alternatives: the likeliest tokens there; both only if asked for.
    """

    token: int
    text: str
    origin: int
    drawn: Alternative | None = None
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Progress:
    """What one pass gave: at least one piece, unless it only says that the answer is over."""

    pieces: tuple[Piece, ...]
    finish_reason: FinishReason | None
    stats: SpeculationStats
    cached_tokens: int
    tokens_per_s: float
    stop_string: str | None = None  # the one that ended it


@dataclass(frozen=True)
class Failure:
    """The answer ends here with an error."""

    error: ApiError

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return what a client is told of an error; the log gets what it cannot know."""
        if isinstance(error, ApiError):
            return cls(error)
        if isinstance(error, OptionError | DataError):
            return cls(invalid(str(error)))
        if isinstance(error, SpecStreamError):
            return cls(ApiError(500, str(error)))
        log.error("an answer failed", exc_info=error)
        return cls(ApiError(500, "the model failed to generate this answer."))


Event = Progress | Failure


@dataclass(eq=False)
class Request:
    """One answer to generate.

    deliver: called in the engine's thread with every event. deadline: of `time.monotonic`.
    after: another answer to the same prompt; this one begins when that one has read it.
    shared: others come after this one, so what it read of the prompt is kept for them.
    Engine and decoding set the rest.
    """

    prompt: list[int]
    settings: Settings
    deliver: Callable[[Event], None]
    deadline: float
    after: Request | None = None
    shared: bool = False
    begun_at: float = 0.0
    cancelled: bool = False
    prompt_read: bool = False
    over: bool = False
    last: Progress | None = field(default=None, repr=False)


class Decoding(Protocol):
    """Advances several answers; only the engine's thread calls it.

    An implementation decides what a step is: one answer's pass, or one pass for all of them.
    """

    @property
    def requests(self) -> Sequence[Request]:
        """Return the answers under way."""

    def begin(self, request: Request) -> None:
        """Take an answer on.

        Raises:
            SpecStreamError: it cannot be begun; nothing of it is left behind.
        """

    def end(self, request: Request) -> None:
        """Let go of an answer, finished or not, and keep its KV cache for others."""

    def step(self) -> list[tuple[Request, Event]]:
        """Advance; return what came of it. An answer that is over stays until `end`.

        An error that concerns one answer is its `Failure`; one that is raised ends them all.
        """
