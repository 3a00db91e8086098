"""Several answers in turn, each with a decoder of its own: a pass of one, then a pass of the next.

A prompt is read in chunks, and a chunk is a turn as well, so that a long prompt does not hold up
answers that are being written.

    turn      1    2    3    4    5    6    7
    answer A  ▒▒        ▒▒        ██        ██     ▒ a chunk of the prompt
    answer B       ██        ██        ██          █ a pass

Works for every model, tree and sampler, because decoding is `stream_generate`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from mlx_specstream import DecodeConfig, GenerationResponse, StreamModel, stream_generate
from mlx_specstream.result import to_ints
from mlx_specstream.statistics import SpeculationStats

from ..prefix import PrefixCache
from ..tokens import decoded
from .prefixes import PrefixStore
from .work import Alternative, Event, Failure, FinishReason, Piece, Progress, Work

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass
class _Answer:
    """One answer under way: first its prompt is read, then `responses` gives tokens."""

    work: Work
    cache: PrefixCache
    cached_tokens: int
    reading: Iterator[int]
    responses: Iterator[GenerationResponse] | None = None
    given: list[int] = field(default_factory=list)
    began: float = 0.0
    failed: bool = False


class Interleaved:
    """Decodes by turns, one answer's pass or one chunk of its prompt per step."""

    def __init__(
        self,
        model: StreamModel,
        tokenizer: TokenizerWrapper,
        prefixes: PrefixStore,
        *,
        config: DecodeConfig | None = None,
        speculative: bool = True,
        prefill_step_size: int = 512,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prefixes = prefixes
        self.config = config
        self.speculative = speculative
        self.prefill_step_size = prefill_step_size
        self.answers: list[_Answer] = []  # whose turn is next comes first

    @property
    def works(self) -> list[Work]:
        return [answer.work for answer in self.answers]

    def begin(self, work: Work) -> None:
        """Take an answer on; its turn comes after the others'."""
        cache, shared = self.prefixes.take(work.prompt)
        rest = work.prompt[shared:-1]
        reading = self.model.prefill(rest, cache.kv, self.prefill_step_size)
        self.answers.append(_Answer(work, cache, shared, reading))

    def end(self, work: Work) -> None:
        """Stop an answer and store what its cache holds, unless an error makes that doubtful."""
        answer = next(one for one in self.answers if one.work is work)
        self.answers.remove(answer)
        if answer.responses is not None:
            answer.responses.close()  # type: ignore[attr-defined]
        if answer.failed:
            return
        answer.cache.settle(work.prompt + answer.given)
        self.prefixes.put(answer.cache)

    def step(self) -> list[tuple[Work, Event]]:
        """Give the next answer its turn."""
        if not self.answers:
            return []
        answer = self.answers.pop(0)
        self.answers.append(answer)
        try:
            if answer.responses is None and not self._read(answer):
                return []
            return [(answer.work, self._pass(answer))]
        except Exception as error:
            answer.failed = True
            return [(answer.work, Failure.of(error))]

    def _read(self, answer: _Answer) -> bool:
        """Read a chunk of the prompt; return whether there was none left, and writing may begin."""
        work, settings = answer.work, answer.work.settings
        if next(answer.reading, None) is not None:
            return False
        read = work.prompt[:-1]
        if work.shared:
            self.prefixes.put(PrefixCache(answer.cache.fork(len(read)), list(read)))
        work.prompt_read = True
        answer.responses = stream_generate(
            self.model,
            self.tokenizer,
            work.prompt[-1:],
            max_tokens=settings.max_tokens,
            sampler=settings.sampler(self.model.backbone.vocab_size),
            logits_processors=settings.processors(read),
            prompt_cache=answer.cache.kv,
            config=self.config,
            speculative=self.speculative,
            stop=settings.stop,
        )
        answer.began = time.perf_counter()
        return True

    def _pass(self, answer: _Answer) -> Progress:
        """Return what the next pass gave out."""
        assert answer.responses is not None
        pieces: list[Piece] = []
        finish: FinishReason | None = None
        stats = SpeculationStats()
        for response in answer.responses:
            answer.given.append(response.token)
            pieces.append(self._piece(response, answer.work.settings.logprobs))
            finish, stats = response.finish_reason, response.stats
            if finish is not None or response.origin == 0:  # the main stream's token comes last
                break
        elapsed = time.perf_counter() - answer.began
        return Progress(
            tuple(pieces), finish, stats, answer.cached_tokens, len(answer.given) / elapsed
        )

    def _piece(self, response: GenerationResponse, logprobs: int | None) -> Piece:
        if logprobs is None:
            return Piece(response.token, response.text, response.origin)
        own, found = ranked(response.logprobs, response.token, logprobs)
        drawn, *alternatives = (
            Alternative(token, decoded(self.tokenizer, [token]), value)
            for token, value in [(response.token, own), *found]
        )
        return Piece(response.token, response.text, response.origin, drawn, tuple(alternatives))


def ranked(logprobs: mx.array, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return a token's log-probability, from (V,), and the `count` likeliest tokens with theirs."""
    logprobs = logprobs.astype(mx.float32)
    count = min(count, logprobs.shape[0] - 1)
    if count == 0:
        return cast(float, logprobs[token].item()), []
    best = mx.argpartition(-logprobs, kth=count - 1)[:count]
    values = mx.concatenate([logprobs[token : token + 1], mx.take(logprobs, best)])
    own, *found = cast(list[float], values.tolist())
    pairs = zip(to_ints(best), found, strict=True)
    return own, sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
