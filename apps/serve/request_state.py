"""One answer under way: what draws its tokens, their text, and its KV cache.

Ids come from a decoder (`scheduler.py` decides which); here they become pieces of text, until the
answer is over. Nothing depends on which decoder it was, so an answer may change it in the middle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import cast

import mlx.core as mx

from ... import StreamModel
from ...generation.run import GenerationRun
from ...generation.text import TextAssembler, detokenizer_for
from ...speculation.result import StepResult, to_ints
from ...speculation.sampling import TokenSampler, TreeProcessor
from ..prefix import PrefixCache
from ..tokens import TokenBytes
from .request import Alternative, Piece, Progress, Request


class RequestState(GenerationRun):
    """The state of one answer, as the server has it.

    cache: its own while no batch holds it. reading: yields while its prompt is being read.
    """

    def __init__(
        self,
        request: Request,
        model: StreamModel,
        tokens: TokenBytes,
        cache: PrefixCache,
        chunk: int,
    ) -> None:
        settings, tokenizer = request.settings, tokens.tokenizer
        # To the sampler the text begins with the prompt's last token, whatever came from a cache.
        token_sampler = TokenSampler(
            settings.sampler(model.backbone.vocab_size, tokenizer),
            settings.processors(request.prompt[:-1], tokenizer.eos_token_ids),
            request.prompt[-1:],
            seed=settings.sampling.seed,
            before=len(request.prompt) - 1,
        )
        for process in token_sampler.processors:
            if isinstance(process, TreeProcessor):
                process.begin(1)
        text = TextAssembler(
            detokenizer_for(tokenizer, continues=settings.continues),
            settings.ends(tokenizer.eos_token_ids),
            settings.stops(request.prompt),
            settings.max_tokens,
        )
        super().__init__(text, request.prompt, cache.kv, token_sampler)
        self.request = request
        self.tokens = tokens
        self.end_tokens = settings.ends(tokenizer.eos_token_ids)
        self.cached_tokens = cache.kv.length
        self.reading: Iterator[int] = model.prefill(
            request.prompt[self.cached_tokens : -1], cache.kv, chunk
        )
        self.steps: Iterator[StepResult] | None = None
        self.began = time.perf_counter()
        self.failed = False

    @property
    def root(self) -> int:
        """Return the one token that is not in the cache: the text's last."""
        return self.given[-1] if self.given else self.request.prompt[-1]

    def begin(self) -> None:
        """Note that the prompt is read and writing begins."""
        self.request.prompt_read = True
        self.began = time.perf_counter()

    def alone(self, steps: Callable[[], Iterator[StepResult]]) -> StepResult:
        """Return the next step of a decoder of its own, which `steps` begins."""
        if self.steps is None:
            self.steps = steps()
        return next(self.steps)

    def settle(self) -> None:
        """End a decoder of its own; the cache then holds the text but its last token."""
        if self.steps is not None:
            self.steps.close()  # type: ignore[attr-defined]
            self.steps = None
        kept = len(self.request.prompt) + len(self.given) - 1
        self.cache.rewind(min(self.cache.length, kept))

    def prefix(self) -> PrefixCache:
        """Return the cache with its tokens, for later requests."""
        text = self.request.prompt + self.given
        return PrefixCache(self.cache, text[: self.cache.length])

    def progress(self, result: StepResult) -> Progress:
        """Return what a step gave out."""
        made, settings = [], self.request.settings
        for index, piece in enumerate(self.pieces):
            drawn: Alternative | None = None
            alternatives: tuple[Alternative, ...] = ()
            # The tokens listed for a continued text are that text: what ends it is no part of it.
            ends = settings.continues and piece.token in self.end_tokens
            if settings.logprobs is not None and not ends:
                drawn, alternatives = self._ranked(result.logits[index], piece.token)
            made.append(Piece(piece.token, piece.text, piece.origin, drawn, alternatives))
            self.given.append(piece.token)
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        return Progress(
            tuple(made),
            self.assembler.finish_reason,
            self.stats,
            self.cached_tokens,
            len(self.given) / elapsed,
            self.assembler.stop.found,
        )

    def _ranked(self, logits: mx.array, token: int) -> tuple[Alternative, tuple[Alternative, ...]]:
        """Return a token and the likeliest ones, in the distribution that it was drawn from."""
        rows = logits[None]
        history = mx.array([self.request.prompt[-1], *self.given])
        for process in self.token_sampler.processors:
            rows = process(history, rows)
        count = self.request.settings.logprobs or 0
        own, found = ranked(rows[0], token, count)
        drawn, *alternatives = (
            Alternative(one, self.tokens.of(one), value) for one, value in [(token, own), *found]
        )
        return drawn, tuple(alternatives)


def ranked(logits: mx.array, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return a token's log-probability, from logits (V,), and the `count` likeliest tokens' ones."""
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    count = min(count, logprobs.shape[0] - 1)
    if count == 0:
        return cast(float, logprobs[token].item()), []
    best = mx.argpartition(-logprobs, kth=count - 1)[:count]
    values = mx.concatenate([logprobs[token : token + 1], mx.take(logprobs, best)])
    own, *found = cast(list[float], values.tolist())
    pairs = zip(to_ints(best), found, strict=True)
    return own, sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
