"""Texts in, texts out: `batch_generate`, after mlx-lm's, with speculation.

Prompts join the batch as room allows and leave it when their answers end, each with its own stop
rules; an answer is the one `stream_generate` gives for its prompt alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..config import DecodeConfig, parse_drafts
from ..config.bounds import whole
from ..errors import OptionError, shown
from ..generation.arguments import (
    Prompt,
    file_index,
    needed_config,
    needed_processors,
    needed_sampler,
    needed_seed,
    prompt_ids,
    refuse_uncallable,
    token_budget,
    wrapped_tokenizer,
)
from ..generation.text import FinishReason, TextAssembler, continues_text, detokenizer_for
from ..loading.load import StreamModel
from ..model.cache import KVCache
from ..speculation.result import StepResult
from ..speculation.sampling import LogitsProcessor, Sampler, TokenSampler, TreeProcessor
from ..speculation.statistics import SpeculationStats
from .decode import PREFILL_BUDGET, BatchDecoder
from .governor import governor_for
from .sequence import BatchSequence

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class BatchAnswer:
    """An answer of a batch. token_ids: with the end-of-turn token, if that ended it."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: SpeculationStats


@dataclass(frozen=True)
class BatchStats:
    """Figures of a batch: tokens, batched steps, seconds from the first prompt to the last token.

    peak_memory: GB. speculation: the answers' figures added up, each pass counted once per
    sequence in it.
    """

    prompt_tokens: int
    generation_tokens: int
    steps: int
    wall_time: float
    peak_memory: float
    speculation: SpeculationStats

    @property
    def generation_tps(self) -> float:
        """Return generated tokens per second of all answers together, prompts included."""
        return self.generation_tokens / self.wall_time if self.wall_time else 0.0

    def __str__(self) -> str:
        return (
            f"Prompts: {self.prompt_tokens} tokens\n"
            f"Generation: {self.generation_tokens} tokens in {self.steps} steps, "
            f"{self.generation_tps:.3f} tokens-per-sec with prompts\n"
            f"Peak memory: {self.peak_memory:.3f} GB\n"
            f"Speculation: {self.speculation}"
        )


@dataclass(frozen=True)
class BatchResponse:
    """The answers in the order of their prompts. caches: if asked for, each answer's KV cache."""

    answers: list[BatchAnswer]
    stats: BatchStats
    caches: list[KVCache] | None = None

    @property
    def texts(self) -> list[str]:
        """Return the answers' texts, as mlx-lm's response has them."""
        return [answer.text for answer in self.answers]

    @property
    def token_ids(self) -> list[list[int]]:
        """Return the answers' tokens."""
        return [answer.token_ids for answer in self.answers]


def batch_generate(
    model: StreamModel | nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    max_tokens: int | Sequence[int] = 128,
    verbose: bool = False,
    *,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    seed: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    config: DecodeConfig | None = None,
    drafts: str | None = None,
    lookup_files: Sequence[str | Path] = (),
    speculative: bool = True,
    completion_batch_size: int = 32,
    prefill_step_size: int = PREFILL_BUDGET,
    return_prompt_caches: bool = False,
    on_answer: Callable[[int, BatchAnswer], None] | None = None,
    is_over: Callable[[int], bool] | None = None,
) -> BatchResponse:
    """Answer several prompts, up to `completion_batch_size` of them at a time in one pass.

    Args:
        model: what `load` returns, or a bare mlx-lm model, which is decoded plainly.
        prompts: texts or token ids.
        max_tokens: the most tokens per answer, one number or one per prompt; -1 for as many as
            the model's context holds.
        verbose: print the figures at the end.
        sampler: as in `stream_generate`; every answer has random numbers of its own.
        logits_processors: as in mlx-lm, without state of their own: all answers share them.
        seed: prompt number i is answered with the seed `seed + i`, or with its own of a sequence;
            None takes seeds from MLX's global generator.
        stop: a string or several that end an answer and are not part of it.
        config: how to decode; drafts are chains as deep as its tree.
        drafts, lookup_files: as in `stream_generate`.
        speculative: False decodes one token per pass, with the same result.
        prefill_step_size: prompt tokens computed between two steps.
        return_prompt_caches: keep every answer's KV cache: prompt and answer but its last token.
        on_answer: told (index of the prompt, answer) as answers end.
        is_over: asked before every pass, told how many tokens there are; once it says yes, answers
            under way are cut where they are, and prompts that still wait get empty ones, of which
            `on_answer` is not told.

    Raises:
        OptionError: an argument that cannot be used. DataError: a look-up file cannot be read.
        ModelError: the model cannot be batched, or computes NaN.
    """
    from mlx_lm.generate import wired_limit

    if not isinstance(model, StreamModel):
        model = StreamModel.plain(model)
    completion_batch_size = whole(
        completion_batch_size, 1, None, "completion_batch_size must be at least 1"
    )
    for name, function in (("on_answer", on_answer), ("is_over", is_over)):
        if function is not None:
            refuse_uncallable(name, function)
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise OptionError(
            f"prompts must be a list of texts or of lists of token ids, got {shown(prompts)}; put a "
            "single one into a list."
        )
    prompts = list(prompts)
    budgets = _per_prompt("max_tokens", max_tokens, len(prompts))
    if isinstance(seed, list | tuple | range):
        seeds = [needed_seed(each) for each in _per_prompt("seed", seed, len(prompts))]
    else:
        first = needed_seed(cast(int | None, seed))
        seeds = [None if first is None else first + i for i in range(len(prompts))]
    processors = needed_processors(logits_processors)
    config = None if config is None else needed_config(config)
    if drafts is not None:
        config = replace(config or DecodeConfig(), drafts=parse_drafts(drafts))
    if any(isinstance(process, TreeProcessor) for process in processors):
        raise OptionError(
            "a grammar follows one answer's text, so answers of a batch cannot share it; add the "
            "prompts to a BatchDecoder, each with a grammar of its own."
        )
    wrapped = wrapped_tokenizer(tokenizer)
    files = None
    if lookup_files:
        files = file_index(wrapped, lookup_files, model.backbone.vocab_size)
    governor = governor_for(model, config) if speculative else None
    decoder = BatchDecoder(
        model, config, speculative, prefill_step_size, governor=governor, files=files
    )
    ids = [prompt_ids(wrapped, prompt, model.backbone.vocab_size) for prompt in prompts]
    lossy = config is not None and config.typical is not None
    requests = [
        _Request(
            index,
            prompt,
            # Each with a detokenizer of its own: the property makes a new one.
            TextAssembler(
                detokenizer_for(wrapped, continues=continues_text(wrapped, text, prompt)),
                wrapped.eos_token_ids,
                stop,
                token_budget(budget, len(prompt), model.context_length),
            ),
            TokenSampler(
                needed_sampler(sampler),
                processors,
                list(prompt),
                seed=seeds[index],
            ),
            stats=SpeculationStats(lossy=lossy),
        )
        for index, (text, prompt, budget) in enumerate(zip(prompts, ids, budgets, strict=True))
    ]
    begun = time.perf_counter()
    with wired_limit(model.model):
        steps = _run(
            decoder,
            requests,
            completion_batch_size,
            on_answer or (lambda _, __: None),
            is_over or (lambda _: False),
            return_prompt_caches,
        )
    answers = [request.ended() for request in requests]
    stats = BatchStats(
        prompt_tokens=sum(map(len, ids)),
        generation_tokens=sum(answer.stats.tokens for answer in answers),
        steps=steps,
        wall_time=time.perf_counter() - begun,
        peak_memory=mx.get_peak_memory() / 1e9,
        speculation=sum((answer.stats for answer in answers), SpeculationStats(lossy=lossy)),
    )
    if verbose:
        print(stats)
    caches = [request.cache for request in requests] if return_prompt_caches else None
    return BatchResponse(answers, stats, caches)


def _per_prompt(name: str, values: Any, count: int) -> list[Any]:
    """Return a value for each of `count` prompts: of one the same for all, of several its own.

    Raises:
        OptionError: several, but not one for each.
    """
    if not isinstance(values, list | tuple | range):
        return [values] * count
    if len(values) != count:
        raise OptionError(f"{name} has {len(values)} entries for {count} prompts.")
    return list(values)


@dataclass
class _Request:
    """A prompt and its answer as it grows."""

    index: int
    prompt: list[int]
    answer: TextAssembler
    token_sampler: TokenSampler
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    cache: KVCache = field(default_factory=lambda: KVCache(0))

    def should_continue(self, result: StepResult) -> bool:
        """Take a step's tokens and tell whether the answer needs another step."""
        pieces = self.answer.take(result.tokens, result.origins)
        self.pieces += [piece.text for piece in pieces]
        self.tokens += [piece.token for piece in pieces]
        self.stats = self.stats.after([piece.origin for piece in pieces], result.drafted)
        return self.answer.finish_reason is None

    def cut(self) -> None:
        """End the answer where it is."""
        self.pieces.append(self.answer.cut())

    def ended(self) -> BatchAnswer:
        """Return the answer once it is over."""
        assert self.answer.finish_reason is not None
        text = "".join(self.pieces)
        return BatchAnswer(text, self.tokens, self.answer.finish_reason, self.stats)


def _run(
    decoder: BatchDecoder,
    requests: Sequence[_Request],
    batch_size: int,
    on_answer: Callable[[int, BatchAnswer], None],
    is_over: Callable[[int], bool],
    keep_caches: bool,
) -> int:
    """Decode all requests, `batch_size` at a time, until it is over; return the number of steps."""
    queue, under_way = list(reversed(requests)), dict[BatchSequence, _Request]()
    steps = tokens = 0

    def end(sequence: BatchSequence, request: _Request) -> None:
        cache = decoder.remove(sequence)
        if keep_caches:
            # A step may emit tokens behind the answer's end.
            cache.rewind(len(request.prompt) + len(request.tokens) - 1)
            request.cache = cache
        on_answer(request.index, request.ended())

    while (queue or decoder.busy) and not is_over(tokens):
        while queue and len(under_way) < batch_size:
            request = queue.pop()
            sequence = decoder.add(
                request.prompt, token_sampler=request.token_sampler, criteria=request
            )
            under_way[sequence] = request
        events = decoder.step()
        steps += bool(events)
        for sequence, result, error in events:
            if error is not None:
                raise error
            assert result is not None
            tokens += len(result.tokens)
            if sequence.state == "finished":
                end(sequence, under_way.pop(sequence))
    for request in (*under_way.values(), *queue):
        request.cut()
    for sequence, request in under_way.items():
        if request.tokens:
            end(sequence, request)
    return steps
