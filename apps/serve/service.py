"""The running server's parts, and what turns a request's wishes into settings within its limits."""

from __future__ import annotations

import asyncio
import copy
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from ... import DecodeConfig, StreamModel
from ...config import CacheConfig, SamplingConfig
from ...config.sampling import PENALTY_CONTEXT
from ...generation.grammar import Grammar
from ...machine import ranks
from ...model.cache.kinds import check_quantised
from ..learning import Learner
from .disconnect import until_gone
from .engine import Engine
from .errors import ApiError, invalid
from .following import Leading
from .limits import Limits
from .metrics import Metrics
from .prefixes import PrefixStore
from .prompt import PromptEncoder
from .request import Decoding
from .scheduler import Scheduler
from .schema import ChatRequest, CompletionRequest
from .settings import Settings
from .timed import TimedProcess

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

PLACEHOLDER = "default_model"  # mlx-lm's clients name the served model so
READING = 64  # requests that may be read and encoded at once, beside those that are answered

Result = TypeVar("Result")


@dataclass
class Service:
    """One served model with everything around it."""

    model_name: str
    streams_name: str
    mode: str
    num_streams: int
    context_length: int | None
    limits: Limits
    defaults: SamplingConfig
    engine: Engine
    encoder: PromptEncoder
    metrics: Metrics
    vocab_size: int
    created: int = field(default_factory=lambda: int(time.time()))
    encoding: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "specstream-prompts")
    )
    slow_encoding: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "specstream-long-prompts")
    )
    calls: TimedProcess = field(default_factory=lambda: TimedProcess("calls"))
    reading: int = 0

    def check_model(self, name: str | None) -> None:
        """Accept the served model's name, or none.

        Raises:
            ApiError: another model is named.
        """
        if name and name not in (self.model_name, PLACEHOLDER):
            raise ApiError(
                404,
                f"there is no model {name[:200]!r} here; this server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def settings(
        self,
        request: ChatRequest | CompletionRequest,
        prompt_tokens: int,
        choice: int,
        grammar: Grammar | None = None,
    ) -> Settings:
        """Return how one of a request's answers is drawn, within the limits."""
        limits, defaults = self.limits, self.defaults
        wanted = request.max_tokens
        if isinstance(request, ChatRequest):
            wanted = request.max_completion_tokens or wanted
        if wanted == -1:
            wanted = limits.max_tokens_limit
        most = min(wanted or limits.max_tokens, limits.max_tokens_limit)
        if self.context_length is not None:
            most = min(most, self.context_length - prompt_tokens)
        seed = defaults.seed if request.seed is None else request.seed
        if seed is None:
            seed = secrets.randbits(63)
        stop = (request.stop,) if isinstance(request.stop, str) else request.stop or ()
        if grammar is not None and (request.min_tokens or request.ignore_eos):
            raise invalid(
                "min_tokens and ignore_eos do not go with an answer that must fit a format, whose "
                "end the format decides; leave them out.",
                "min_tokens" if request.min_tokens else "ignore_eos",
            )
        return Settings(
            max_tokens=most,
            sampling=SamplingConfig(
                temp=_given(request.temperature, defaults.temp),
                top_p=_given(request.top_p, defaults.top_p),
                top_k=max(_given(request.top_k, defaults.top_k), 0),
                min_p=_given(request.min_p, defaults.min_p),
                xtc_probability=_given(request.xtc_probability, 0.0),
                xtc_threshold=_given(request.xtc_threshold, 0.1),
                seed=(seed + choice) % 2**64,
                repetition_penalty=request.repetition_penalty or 1.0,
                repetition_context_size=_given(request.repetition_context_size, PENALTY_CONTEXT),
                presence_penalty=_given(request.presence_penalty, 0.0),
                presence_context_size=_given(request.presence_context_size, PENALTY_CONTEXT),
                frequency_penalty=_given(request.frequency_penalty, 0.0),
                frequency_context_size=_given(request.frequency_context_size, PENALTY_CONTEXT),
                logit_bias=self._logit_bias(request),
            ),
            stop=tuple(string for string in stop if string),
            stop_token_ids=frozenset(self._known(request.stop_token_ids or (), "stop_token_ids")),
            min_tokens=min(request.min_tokens or 0, most),
            ignore_eos=bool(request.ignore_eos),
            logprobs=request.alternatives,
            grammar=grammar,
        )

    def _logit_bias(self, request: ChatRequest | CompletionRequest) -> dict[int, float]:
        bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
        self._known(bias, "logit_bias")
        return bias

    def _known(self, tokens: Collection[int], param: str) -> Collection[int]:
        """Return token ids if the model has all of them."""
        if wrong := [token for token in tokens if token >= self.vocab_size]:
            raise invalid(
                f"{param}: the token id {wrong[0]} is not below {self.vocab_size}.", param
            )
        return tokens

    def __post_init__(self) -> None:
        self.slow_encoder = copy.deepcopy(self.encoder)

    async def encode(
        self, receive: Receive, encode: Callable[[PromptEncoder], Result], slow: bool = False
    ) -> Result:
        """Run an encoder's work in its thread, so that the event loop goes on.

        slow: long prompts and grammars have a thread of their own, so that short prompts do not
        wait for them. What has not begun when its client leaves is not done.

        Raises:
            ClientDisconnect: the client is gone.
        """
        lane, encoder = (
            (self.slow_encoding, self.slow_encoder) if slow else (self.encoding, self.encoder)
        )

        async def encoded() -> tuple[Result]:
            loop = asyncio.get_running_loop()
            return (await loop.run_in_executor(lane, encode, encoder),)

        found: tuple[Result] | None = await until_gone(receive, encoded())
        if found is None:
            raise ClientDisconnect
        return found[0]

    def stop(self) -> None:
        """End everything that is under way."""
        self.engine.stop()
        self.calls.close()
        self.slow_encoder.grammars.close()
        for lane in (self.encoding, self.slow_encoding):
            lane.shutdown(cancel_futures=True)
        self.encoder.grammars.close()


@contextmanager
def decoding(
    load: Callable[[], tuple[StreamModel, TokenizerWrapper]],
    limits: Limits,
    config: DecodeConfig | None,
    speculative: bool,
    caching: CacheConfig | None,
    learned: Path | None = None,
) -> Iterator[Scheduler]:
    """Load a model and give what decodes with it, ready for the first answer.

    Raises:
        SpecStreamError: it cannot be loaded.
    """
    from mlx_lm.generate import wired_limit

    model, tokenizer = load()
    backbone = model.backbone
    check_quantised(backbone.forward, backbone.windows, caching or CacheConfig())
    with wired_limit(model.model):
        scheduler = Scheduler(
            model,
            tokenizer,
            prompt_cache_bytes=limits.prompt_cache_bytes,
            config=config,
            speculative=speculative,
            prefill_step_size=limits.prefill_step_size,
            caching=caching,
            learner=None if learned is None else Learner(learned, tokenizer),
        )
        scheduler.warm_up()
        yield scheduler


def start_service(
    load: Callable[[], tuple[StreamModel, TokenizerWrapper]],
    limits: Limits,
    defaults: SamplingConfig | None = None,
    *,
    config: DecodeConfig | None = None,
    speculative: bool = True,
    caching: CacheConfig | None = None,
    template_args: Mapping[str, Any] | None = None,
    control_tokens: bool = False,
    learned: Path | None = None,
) -> Service:
    """Load a model in the engine's thread and return the service that answers with it.

    caching: how KV caches hold rows; unless all of them as computed, answers take turns.
    template_args: the chat template's variables where a request does not say. control_tokens:
    let users and tools write control tokens. learned: the file that answers are kept in to train on.

    Raises:
        SpecStreamError: it cannot be loaded.
    """
    found: list[tuple[StreamModel, TokenizerWrapper, PrefixStore]] = []

    @contextmanager
    def making() -> Iterator[Decoding]:
        with decoding(load, limits, config, speculative, caching, learned) as scheduler:
            found.append((scheduler.model, scheduler.tokenizer, scheduler.prefixes))
            if ranks.group() is None:
                yield scheduler
                return
            leading = Leading(scheduler)
            try:
                yield leading
            finally:
                leading.stop()

    engine = Engine(
        making, decode_concurrency=limits.decode_concurrency, max_queue=limits.max_queue
    )
    engine.start()
    model, tokenizer, prefixes = found.pop()
    metrics = Metrics()
    metrics.watch("active_answers", "Answers being generated.", lambda: engine.active)
    metrics.watch("waiting_answers", "Answers waiting in line.", lambda: len(engine.waiting))
    metrics.watch("prompt_cache_bytes", "Memory of stored KV caches.", lambda: prefixes.nbytes)
    metrics.watch("prompt_cache_entries", "Stored KV caches.", lambda: len(prefixes.entries))
    streams = model.streams
    context = model.context_length
    limit = _smaller(limits.max_prompt_tokens, None if context is None else context - 1)
    return Service(
        model_name=served_name(model.name),
        streams_name=served_name(model.streams_name) if model.streams_name else "",
        mode=model.drafting if speculative else "plain",
        num_streams=0 if streams is None or not speculative else streams.num_streams,
        context_length=context,
        limits=limits,
        defaults=defaults or SamplingConfig(),
        engine=engine,
        encoder=PromptEncoder(
            tokenizer,
            model.backbone.vocab_size,
            limit,
            template_args=template_args,
            control_tokens=control_tokens,
        ),
        metrics=metrics,
        vocab_size=model.backbone.vocab_size,
    )


def served_name(name: str) -> str:
    """Return what clients call a model: a hub id or a shipped name as it is, a folder's last part."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else name


Value = TypeVar("Value")


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _smaller(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
