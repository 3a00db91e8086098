"""Text in, text out: `generate` and `stream_generate`, drop-in for mlx-lm's.

    prompt ids ──► prefill ──► step ──► tokens of the accepted path ──► text, one response a token
                                ▲                    │
                                └── next step ◄── more wanted? (end of turn, stop string, budget)

Whether another step is wanted is decided before it is scheduled; the text is handed out while
the device computes it. However the loop ends (also by closing the generator or Ctrl-C), the KV
cache holds exactly the prompt and the tokens handed out, except the last one, which the next
call's prompt begins with. A cache of mlx-lm's own layers, as mlx-lm leaves it, holds that too.

The module is not named `generate`, because `mlx_specstream.generate` is the function.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from .answer import Answer, FinishReason, Piece
from .baseline import PlainDecoder, plain_decoder
from .cache import KVCache, from_mlx_lm, to_mlx_lm
from .cache.kinds import check_quantised, quantization
from .config import CacheConfig, DecodeConfig
from .decode import StreamDecoder
from .errors import OptionError
from .loading import StreamModel
from .plan.auto import AutoDecoder
from .plan.ready import planner_for
from .prefill import PREFILL_CHUNK
from .result import DraftRecord, StepResult
from .sampling import LogitsProcessor, Sampler, TokenChooser, TreeProcessor
from .statistics import SpeculationStats

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("mlx_specstream")

Prompt = str | Sequence[int] | mx.array
Progress = Callable[[int, int], None]
CLEAR_EVERY = 256  # tokens, after which unused buffers are given back, as mlx-lm does

# mlx-lm's options that are not supported; None means that they are not in use.
_UNSUPPORTED = ("draft_model", "input_embeddings", "stream")
# mlx-lm's options that only qualify an unsupported one.
_WITHOUT_EFFECT = ("num_draft_tokens",)


@dataclass(frozen=True)
class GenerationResponse:
    """One token with the text it completes: mlx-lm's fields, and the figures of speculation.

    text: may be empty, for a character or a stop string may still be incomplete. origin: who
    proposed the token, its stream 1..γ, or 0 for the main stream. stats: figures up to and
    including the pass this token came from. draft: the tree that pass verified, if drafts were
    asked for. logits: (V,), before processors, on the device.
    finish_reason: `stop` (end of turn, stop string), `length`, or None before the last token.
    """

    text: str
    token: int
    origin: int
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: FinishReason | None
    stats: SpeculationStats
    draft: DraftRecord | None = field(repr=False)
    logits: mx.array = field(repr=False)
    processed: Callable[[mx.array], mx.array] = field(repr=False)

    @property
    def from_draft(self) -> bool:
        """Tell whether a stream had proposed the token."""
        return self.origin > 0

    @property
    def logprobs(self) -> mx.array:
        """Return the target's log-probabilities (V,), computed when asked for."""
        logits = self.processed(self.logits)
        return logits - mx.logsumexp(logits, keepdims=True)


def generate(
    model: StreamModel | nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    verbose: bool = False,
    **options: Any,
) -> str:
    """Return the whole answer to a prompt; `options` are those of `stream_generate`.

    `verbose` prints the text as it comes, then the figures.
    """
    if verbose:
        print("=" * 10)
    text, response = "", None
    for response in stream_generate(model, tokenizer, prompt, **options):
        if verbose:
            print(response.text, end="", flush=True)
        text += response.text
    if verbose:
        print()
        print("=" * 10)
        if response is None or not text:
            print("No text generated for this prompt")
        else:
            print(summary(response))
    return text


def summary(response: GenerationResponse) -> str:
    """Return the figures of an answer's last response in lines, mlx-lm's first."""
    lines = [
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec",
        (
            f"Generation: {response.generation_tokens} tokens, "
            f"{response.generation_tps:.3f} tokens-per-sec"
        ),
        f"Peak memory: {response.peak_memory:.3f} GB",
    ]
    if response.stats.drafted:
        lossy = " (lossy)" if response.stats.lossy else ""
        lines.append(f"Speculation{lossy}: {response.stats}")
    return "\n".join(lines)


def stream_generate(
    model: StreamModel | nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: KVCache | list[Any] | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prefill_step_size: int = PREFILL_CHUNK,
    prompt_progress_callback: Progress | None = None,
    config: DecodeConfig | None = None,
    speculative: bool = True,
    stop: Sequence[str] = (),
    keep_drafts: bool = False,
    seed: int | None = None,
    **mlx_lm_options: Any,
) -> Iterator[GenerationResponse]:
    """Generate an answer token by token.

    Args:
        model: what `load` returns, or a bare mlx-lm model, which is decoded plainly.
        prompt: a text, or token ids.
        max_tokens: the most tokens to generate; -1 for as many as the model's context holds.
        sampler: log-probabilities (n, V) to tokens (n,), as mlx-lm's `make_sampler` makes them;
            None takes the most likely token.
        logits_processors: as in mlx-lm; every draft token gets its own history. Also a
            grammar's (`grammar.py`), for answers that fit a JSON schema.
        prompt_cache: what earlier text left: a `KVCache`, or a list of mlx-lm's. It is updated.
        max_kv_size: how many rows a new cache holds where the model has no sliding window (the
            first four always among them); also for models that mlx-lm ignores it for.
        kv_bits, kv_group_size, quantized_kv_start: store rows in a few bits, from so many on.
        config: how to decode; None for the tree that pays here, plain decoding included.
        speculative: False decodes one token per pass, with the same result.
        stop: strings that end the answer and are not part of it.
        seed: of this answer's random numbers; None takes one from MLX's global generator, so
            that `mx.random.seed` before the call repeats the answer. The same seed gives the
            same text with any tree and without speculation.
        keep_drafts: put every verified tree into its tokens' responses.

    Raises:
        OptionError: an argument that cannot be used. Raised by the call, before the first token.
        ModelError: the model computes NaN.
    """
    _refuse(mlx_lm_options)
    if not isinstance(model, StreamModel):
        model = StreamModel.plain(model)
    tokenizer = wrapped_tokenizer(tokenizer)
    ids = prompt_ids(tokenizer, prompt, model.backbone.vocab_size)
    caching = CacheConfig(max_kv_size, kv_bits, kv_group_size, quantized_kv_start)
    cache = _cache_for(model, prompt_cache, caching)
    max_tokens = token_budget(max_tokens, cache.length + len(ids), model.context_length)
    if prefill_step_size < 1:
        raise OptionError(f"prefill_step_size must be at least 1, got {prefill_step_size}.")
    chooser = TokenChooser(
        needed_sampler(sampler), tuple(logits_processors or ()), list(ids), seed=seed
    )
    for process in chooser.processors:
        if isinstance(process, TreeProcessor):
            process.begin(len(ids))
    decoder = decoder_for(model, config, chooser, speculative)
    if not isinstance(decoder, PlainDecoder):
        decoder.keep_drafts = keep_drafts
    run = _Run(
        decoder=decoder,
        answer=Answer(tokenizer.detokenizer, tokenizer.eos_token_ids, stop, max_tokens),
        prompt=ids,
        cache=cache,
        lent=None if isinstance(prompt_cache, KVCache) else prompt_cache,
        processors=chooser.processors,
        stats=SpeculationStats(lossy=chooser.typical is not None),
    )
    return run.responses(model.model, prefill_step_size, prompt_progress_callback)


def decoder_for(
    model: StreamModel, config: DecodeConfig | None, chooser: TokenChooser, speculative: bool
) -> PlainDecoder | StreamDecoder | AutoDecoder:
    """Return the loop over token ids that generates with these settings.

    With the tree `auto` the first call may take some seconds, to measure what steps cost here.
    """
    if model.streams is None or not speculative:
        return plain_decoder(model.backbone, model.streams, chooser)
    config = config or DecodeConfig()
    planner = planner_for(model, config)
    if planner is not None:
        return AutoDecoder(model.streams, config, chooser, planner)
    return StreamDecoder(model.streams, config, chooser)


def prompt_ids(tokenizer: TokenizerWrapper, prompt: Prompt, vocab_size: int) -> list[int]:
    """Return a prompt's token ids; a text gets its special tokens unless it begins with them.

    Raises:
        OptionError: the prompt is empty, or holds ids the model does not have.
    """
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        ids = tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))
        ids = list(ids) if prompt else []
    elif isinstance(prompt, mx.array):
        if prompt.ndim != 1:
            raise OptionError(f"a prompt of ids must have one dimension, got shape {prompt.shape}.")
        ids = [int(token) for token in prompt.tolist()]  # type: ignore[union-attr, arg-type]
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise OptionError("the prompt is empty; give at least one token.")
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise OptionError(
            f"the prompt holds the token id {wrong[0]}, but the model's ids are 0 to "
            f"{vocab_size - 1}; encode it with the model's own tokenizer."
        )
    return ids


@dataclass
class _Run:
    """One answer under way: the loop over steps, and what has to be put right when it ends."""

    decoder: PlainDecoder | StreamDecoder | AutoDecoder
    answer: Answer
    prompt: list[int]
    cache: KVCache
    lent: list[Any] | None
    processors: Sequence[LogitsProcessor]
    pieces: list[Piece] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    given: list[int] = field(default_factory=list)

    def responses(
        self, module: nn.Module, chunk: int, progress: Progress | None
    ) -> Iterator[GenerationResponse]:
        """Yield a response per token until the answer is over."""
        from mlx_lm.generate import wired_limit

        start = self.cache.length
        self.cache.mark()
        with wired_limit(module):
            try:
                yield from self._tokens(chunk, progress or (lambda _, __: None))
            finally:
                self._settle(start)

    def wanted(self, result: StepResult) -> bool:
        """Turn a step's tokens into text and tell whether the answer needs another step."""
        self.pieces = self.answer.take(result.tokens, result.origins)
        accepted = sum(piece.origin > 0 for piece in self.pieces)
        self.stats = self.stats.after(
            tokens=len(self.pieces), accepted=accepted, drafted=result.drafted
        )
        return self.answer.finish_reason is None

    def _tokens(self, chunk: int, progress: Progress) -> Iterator[GenerationResponse]:
        started = time.perf_counter()
        total = len(self.prompt)
        progress(0, total)
        self.decoder.prefill(
            self.prompt[:-1], self.cache, lambda done, _: progress(done, total), chunk
        )
        mx.clear_cache()
        prompt_tps = 0.0
        for result in self.decoder.steps(self.prompt[-1], self.cache, self.wanted):
            if not self.given:
                progress(total, total)
                prompt_tps = total / (time.perf_counter() - started)
                started = time.perf_counter()
            for index, piece in enumerate(self.pieces):
                self.given.append(piece.token)
                yield GenerationResponse(
                    text=piece.text,
                    token=piece.token,
                    origin=piece.origin,
                    prompt_tokens=total,
                    prompt_tps=prompt_tps,
                    generation_tokens=len(self.given),
                    generation_tps=len(self.given) / (time.perf_counter() - started),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=piece.finish_reason,
                    stats=self.stats,
                    draft=result.draft,
                    logits=result.logits[index],
                    processed=self._processing(),
                )
                if len(self.given) % CLEAR_EVERY == 0:
                    mx.clear_cache()

    def _processing(self) -> Callable[[mx.array], mx.array]:
        """Return what makes the logits of the newest token those it was drawn from."""
        if not self.processors:
            return lambda logits: logits
        history = [*self.prompt, *self.given[:-1]]

        def processed(logits: mx.array) -> mx.array:
            rows = logits[None]
            for process in self.processors:
                rows = process(mx.array(history), rows)
            return rows[0]

        return processed

    def _settle(self, start: int) -> None:
        """Leave in the cache what was handed out: all of it but the last token.

        Also after an error or an interrupt at any point. Layers of mlx-lm's get the last token
        too, as mlx-lm leaves them, so that a next turn's prompt continues from there.
        """
        kept = start + len(self.prompt) + len(self.given) - 1
        end = min(self.cache.length, kept)
        if self.cache.can_rewind(end):
            self.cache.cut(end)
        else:
            # A state after just these tokens is not there: compute them again from one that is.
            reached = self.cache.nearest(end)
            self.cache.rewind(reached)
            text = [*self.prompt, *self.given]
            self.decoder.prefill(text[reached - start : end - start], self.cache)
        if self.lent is None:
            return
        if self.given and self.cache.length == kept:
            self.decoder.prefill(self.given[-1:], self.cache)
        if self.cache.length:
            to_mlx_lm(self.cache, self.lent)


def _refuse(options: dict[str, Any]) -> None:
    """Refuse options of mlx-lm that would otherwise be ignored, and words nobody knows."""
    for name, value in options.items():
        if name in _UNSUPPORTED:
            if value is not None:
                raise OptionError(
                    f"the option {name} of mlx-lm is not supported yet; leave it out, or use "
                    "mlx-lm itself for this."
                )
        elif name not in _WITHOUT_EFFECT:
            raise OptionError(f"stream_generate has no option {name!r}.")


def wrapped_tokenizer(tokenizer: Any) -> TokenizerWrapper:
    """Return a tokenizer as mlx-lm hands one to its callers."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)


def needed_sampler(sampler: Sampler | None) -> Sampler | None:
    """Return None for mlx-lm's greedy sampler, which needs no log-probabilities."""
    from mlx_lm import sample_utils

    return None if sampler is getattr(sample_utils, "greedy_sampler", None) else sampler


def _cache_for(
    model: StreamModel, given: KVCache | list[Any] | None, config: CacheConfig
) -> KVCache:
    """Return the cache to decode in: the given one, a copy of mlx-lm's layers, or a new one."""
    backbone = model.backbone
    check_quantised(backbone.forward, backbone.windows, config)
    if given is None:
        return backbone.new_cache(config)
    size = len(given.layers) if isinstance(given, KVCache) else len(given)
    if size != backbone.num_layers:
        raise OptionError(
            f"the prompt cache has {size} layers and the model {backbone.num_layers}; make it for "
            "this model."
        )
    if config.max_kv_size is not None:
        log.warning("note: max_kv_size is for new caches; the one that was given keeps its size.")
    if not isinstance(given, KVCache):
        return from_mlx_lm(given, backbone.windows, quantization(config))
    if config.kv_bits is not None:
        given.quantize = quantization(config)
    return given


def token_budget(max_tokens: int, prompt_tokens: int, context_length: int | None) -> int:
    """Return how many tokens may be generated within the model's context; -1 for any number.

    Raises:
        OptionError: none, because the prompt fills the context, or max_tokens makes no sense.
    """
    if max_tokens == 0 or max_tokens < -1:
        raise OptionError(
            f"max_tokens must be at least 1, or -1 for no limit of its own, got {max_tokens}."
        )
    if context_length is None:
        return max_tokens
    left = context_length - prompt_tokens
    if left < 1:
        raise OptionError(
            f"the prompt has {prompt_tokens} tokens, but the model's context holds "
            f"{context_length}, answer included; shorten the prompt."
        )
    if max_tokens > left:
        log.warning(
            "note: at most %d more tokens fit into the model's context of %d, fewer than the %d "
            "asked for.",
            left,
            context_length,
            max_tokens,
        )
    return left if max_tokens == -1 else min(max_tokens, left)
