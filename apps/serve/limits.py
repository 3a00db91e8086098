"""What the server allows: sizes, times, numbers, and who may ask."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import OptionError

MAX_CHOICES = 8  # answers to one request: prompts times n
MAX_STOPS = 256
MAX_BIASES = 1024
MAX_LOGPROBS = 20  # OpenAI's limit of top_logprobs
LONG_PROMPT = 2**16  # characters; longer ones are cut into tokens apart from shorter ones
MAX_DEPTH = 64  # of nested JSON
MAX_DIGITS = 1000  # of an integer; Python itself reads 4,300
MAX_TOOLS = 128
MAX_MESSAGES = 4096


@dataclass(frozen=True)
class Limits:
    """Bounds of what requests may cost.

    decode_concurrency: answers that are generated at the same time. max_queue: answers that may
    wait for that. max_prompt_tokens: None for what the model's context holds. max_tokens: of an
    answer whose request does not say; max_tokens_limit: of any answer. time_limit_s: from the
    request's arrival to the answer's last token. header_time_limit_s, body_time_limit_s: for
    sending a request. idle_time_limit_s: of a connection between requests, and of a client that
    does not read what it is sent.

    Raises:
        OptionError: a bound makes no sense.
    """

    decode_concurrency: int = 4
    max_queue: int = 32
    max_body_bytes: int = 2 * 2**20
    max_prompt_tokens: int | None = None
    max_tokens: int = 512
    max_tokens_limit: int = 32768
    max_connections: int = 512
    time_limit_s: float = 600.0
    header_time_limit_s: float = 10.0
    body_time_limit_s: float = 30.0
    idle_time_limit_s: float = 30.0
    shutdown_limit_s: float = 20.0
    prefill_step_size: int = 512
    prompt_cache_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name, least in (
            ("decode_concurrency", 1),
            ("max_queue", 0),
            ("max_body_bytes", 1024),
            ("max_connections", 1),
            ("max_tokens", 1),
            ("max_tokens_limit", 1),
            ("prefill_step_size", 1),
            ("prompt_cache_bytes", 0),
        ):
            if getattr(self, name) < least:
                raise OptionError(
                    f"--{name.replace('_', '-')} must be at least {least}, got "
                    f"{getattr(self, name)}."
                )
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise OptionError(
                f"--max-prompt-tokens must be at least 1, got {self.max_prompt_tokens}."
            )
        for name in (
            "time_limit_s",
            "header_time_limit_s",
            "body_time_limit_s",
            "idle_time_limit_s",
            "shutdown_limit_s",
        ):
            if not 0 < getattr(self, name) < float("inf"):
                raise OptionError(
                    f"--{name.removesuffix('_s').replace('_', '-')} must be more than 0 seconds, "
                    f"got {getattr(self, name)}."
                )


@dataclass(frozen=True)
class Access:
    """Who may ask: a key if there is one, and names and web pages beside the server's own."""

    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
