"""One answer under way: from the prompt to responses, and what has to be put right when it ends.

However the loop ends (also by closing the generator or Ctrl-C), the KV cache holds exactly the
prompt and the tokens handed out, except the last one, which the next call's prompt begins with. A
cache of mlx-lm's own layers, as mlx-lm leaves it, holds that too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.cache import KVCache, to_mlx_lm
from ..model.prefill import ChunkSize
from ..planner.adaptive import AutoDecoder
from ..speculation.decode import StreamDecoder
from ..speculation.plain import PlainDecoder
from ..speculation.result import StepResult
from ..speculation.sampling import LogitsProcessor
from ..speculation.statistics import SpeculationStats
from .answer import Answer, Piece
from .response import GenerationResponse

Decoder = PlainDecoder | StreamDecoder | AutoDecoder
Progress = Callable[[int, int], None]
CLEAR_EVERY = 256  # tokens, after which unused buffers are given back, as mlx-lm does


@dataclass
class Answering:
    """The loop over steps of one answer.

    prompt: token ids, at least one; all but the last are in the prefill. cache: what comes before
    the prompt, then the text as it grows. lent: the caller's layers of mlx-lm, which get the text
    at the end; None if there are none. pieces: of the newest step. given: tokens handed out.
    """

    decoder: Decoder
    answer: Answer
    prompt: list[int]
    cache: KVCache
    lent: list[Any] | None
    processors: Sequence[LogitsProcessor]
    pieces: list[Piece] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    given: list[int] = field(default_factory=list)

    def responses(
        self, module: nn.Module, chunk: ChunkSize, progress: Progress | None
    ) -> Iterator[GenerationResponse]:
        """Yield a response per token until the answer is over.

        module: mlx-lm's model, whose memory is kept wired meanwhile. chunk: prompt tokens per
        pass. progress: told (prompt tokens done, of how many).
        """
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
        self.stats = self.stats.after([piece.origin for piece in self.pieces], result.drafted)
        return self.answer.finish_reason is None

    def _tokens(self, chunk: ChunkSize, progress: Progress) -> Iterator[GenerationResponse]:
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
