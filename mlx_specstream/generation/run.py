"""One answer under way: from the prompt to responses, and what has to be put right when it ends.

However the loop ends (also by closing the generator or Ctrl-C), the KV cache holds exactly the
prompt and the tokens handed out, except the last one, which the next call's prompt begins with. A
cache of mlx-lm's own layers, as mlx-lm leaves it, holds that too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import mlx.core as mx
import mlx.nn as nn

from ..errors import OptionError, shown
from ..model.cache import KVCache, to_mlx_lm
from ..model.prefill import PREFILL_CHUNK, ChunkSize
from ..speculation.decode import Decoder, decode
from ..speculation.result import StepResult
from ..speculation.sampling import TokenSampler
from ..speculation.statistics import SpeculationStats
from .response import GenerationResponse
from .text import TextAssembler, TextPiece

log = logging.getLogger("mlx_specstream")

Progress = Callable[[int, int], None]
CLEAR_EVERY = 256  # tokens, after which unused buffers are given back, as mlx-lm does


@dataclass(eq=False)
class GenerationRun:
    """One answer: its prompt, its KV cache, and its text as it grows.

    prompt: token ids, at least one; all but the last are in the prefill. cache: what comes before
    the prompt, then the text as it grows. pieces: of the newest step. given: tokens of the answer.
    """

    assembler: TextAssembler
    prompt: list[int]
    cache: KVCache
    token_sampler: TokenSampler
    pieces: list[TextPiece] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    given: list[int] = field(default_factory=list)

    def should_continue(self, result: StepResult) -> bool:
        """Turn a step's tokens into text and tell whether the answer needs another step."""
        self.pieces = self.assembler.take(result.tokens, result.origins)
        self.stats = self.stats.after([piece.origin for piece in self.pieces], result.drafted)
        return self.assembler.finish_reason is None

    def responses(
        self,
        decoder: Decoder,
        module: nn.Module,
        lent: list[Any] | None = None,
        chunk: ChunkSize = PREFILL_CHUNK,
        progress: Progress = lambda _, __: None,
    ) -> Iterator[GenerationResponse]:
        """Yield a response per token until the answer is over.

        module: mlx-lm's model, whose memory is kept wired meanwhile. lent: the caller's layers of
        mlx-lm, which get the text at the end. chunk: prompt tokens per pass. progress: told
        (prompt tokens done, of how many).
        """
        from mlx_lm.generate import wired_limit

        begin, total, started = self.cache.length, len(self.prompt), time.perf_counter()
        self.cache.mark()
        last: GenerationResponse | None = None  # the newest response that was handed out
        prompt_tps = 0.0
        with wired_limit(module):
            try:
                try:
                    progress(0, total)
                    steps = decode(
                        decoder,
                        self.prompt,
                        self.cache,
                        self,
                        lambda n, _: progress(n, total),
                        chunk,
                    )
                    for result in steps:
                        if last is None:
                            progress(total, total)
                            prompt_tps = total / (time.perf_counter() - started)
                            started = time.perf_counter()
                        for index, piece in enumerate(self.pieces):
                            seconds = time.perf_counter() - started
                            response = self._response(result, index, piece, prompt_tps, seconds)
                            # In one line: an interrupt cannot fall between counting and handing out.
                            yield (last := response)
                            if len(self.given) % CLEAR_EVERY == 0:
                                mx.clear_cache()
                finally:
                    self._settle(begin, decoder, lent, last)
            except KeyboardInterrupt:  # which may have fallen into settling
                self._settle(begin, decoder, lent, last)
                raise

    def _response(
        self, result: StepResult, index: int, piece: TextPiece, prompt_tps: float, seconds: float
    ) -> GenerationResponse:
        """Return the response with a piece of a step's text; `seconds`: since the prompt was read."""
        processed = self._processing(len(self.given))
        self.given.append(piece.token)
        return GenerationResponse(
            text=piece.text,
            token=piece.token,
            origin=piece.origin,
            prompt_tokens=len(self.prompt),
            prompt_tps=prompt_tps,
            generation_tokens=len(self.given),
            generation_tps=len(self.given) / seconds,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=piece.finish_reason,
            stats=self.stats,
            draft=result.draft,
            logits=result.logits[index],
            processed=processed,
        )

    def _processing(self, before: int) -> Callable[[mx.array], mx.array]:
        """Return what makes logits those that the token after `before` given ones was drawn from."""
        processors = self.token_sampler.processors
        if not processors:
            return lambda logits: logits

        def processed(logits: mx.array) -> mx.array:
            text = mx.array(self.prompt + self.given[:before])
            rows = logits[None]
            for process in processors:
                rows = process(text, rows)
            return rows[0]

        return processed

    def _settle(
        self,
        begin: int,
        decoder: Decoder,
        lent: list[Any] | None,
        last: GenerationResponse | None,
    ) -> None:
        """Leave in the cache what was handed out, up to `last`: all of it but the last token.

        Also after an error or an interrupt at any point, and after one of this. Layers of mlx-lm's get
        the last token too, as mlx-lm leaves them, so that a next turn's prompt continues from there.
        """
        del self.given[0 if last is None else last.generation_tokens :]
        kept = begin + len(self.prompt) + len(self.given) - 1
        end = min(self.cache.length, kept)
        if self.cache.can_rewind(end):
            self.cache.cut(end)
        else:
            # A state after just these tokens is not there: compute them again from one that is.
            reached = self.cache.nearest(end)
            self.cache.rewind(reached)
            text = [*self.prompt, *self.given]
            decoder.prefill(text[reached - begin : end - begin], self.cache)
        if lent is None:
            return
        if self.given and self.cache.length == kept:
            decoder.prefill(self.given[-1:], self.cache)
        if self.cache.length:
            to_mlx_lm(self.cache, lent)


# By the prompt cache (of mlx-lm's: its first layer), the newest answer that uses it.
_answers: WeakKeyDictionary[Any, ReferenceType[Any]] = WeakKeyDictionary()


def claim(prompt_cache: KVCache | list[Any] | None) -> None:
    """End an answer that is still under way in a prompt cache, so that another may begin there.

    Its generator may be kept by a variable or a traceback; only ended does it leave the cache at
    the tokens that were handed out.

    Raises:
        OptionError: that answer is being computed right now, such as in another thread; or this
            is no prompt cache.
    """
    layers = [] if prompt_cache is None or isinstance(prompt_cache, KVCache) else prompt_cache
    if not isinstance(layers, list | tuple) or not all(
        hasattr(type(each), "state")  # asked of itself, an empty one of mlx-lm 0.31 fails
        for each in layers
    ):
        raise OptionError(
            f"prompt_cache must be a KVCache or mlx-lm's list of a cache per layer, got {shown(layers)}."
        )
    earlier = None if not prompt_cache else _answers.get(_key(prompt_cache))
    generator = None if earlier is None else earlier()
    if generator is None or generator.gi_frame is None:
        return
    try:
        generator.close()
    except ValueError as error:  # "generator already executing"
        raise OptionError(
            "this prompt cache is in use: another answer is being generated with it right now; "
            "wait until that has ended, or use a prompt cache of its own."
        ) from error
    log.warning("note: an answer that was not read to its end has ended: its prompt cache is used.")


def remember(
    prompt_cache: KVCache | list[Any] | None, answer: Iterator[GenerationResponse]
) -> None:
    """Note which answer is under way in a prompt cache."""
    if prompt_cache:
        _answers[_key(prompt_cache)] = ref(answer)


def _key(prompt_cache: KVCache | list[Any]) -> Any:
    return prompt_cache if isinstance(prompt_cache, KVCache) else prompt_cache[0]
