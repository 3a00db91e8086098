"""Whose turn it is: prompts are read a chunk at a time, and answers are written together.

    step            1    2    3    4    5    6    7
    answer A        ▒    ██   ██   ██   ██   ██   ██     ▒ a chunk of its prompt
    answer B                  ▒    ▒    ██   ██          █ a pass
    decoder         -    tree tree tree batch     tree

Between two passes at most one chunk of one prompt is read, so that a long prompt does not hold up
answers that are being written. One answer alone is decoded with draft trees; several share one
pass, each with a chain of drafts [SS App. F]. Either way drafts are looked up in each answer's own
text, too, and its tokens are those it would get alone.
Where a model cannot be batched, answers take turns.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from ... import DecodeConfig, StreamModel
from ...batch import BatchDecoder, BatchSequence
from ...batch.governor import governor_for
from ...config import CacheConfig
from ...errors import SpecStreamError
from ...exit_status import end_if_lost
from ...generation.generate import decoder_for
from ...speculation.result import MaxTokens, StepResult
from ...speculation.sampling import TokenSampler
from ..learning import Learner
from ..prefix import PrefixCache
from ..tokens import TokenBytes
from .prefixes import PrefixStore
from .request import Event, Failure, Request
from .request_state import RequestState

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger("mlx_specstream")


class Scheduler:
    """Decodes the answers under way, alone or together."""

    def __init__(
        self,
        model: StreamModel,
        tokenizer: TokenizerWrapper,
        *,
        prompt_cache_bytes: int = 0,
        config: DecodeConfig | None = None,
        speculative: bool = True,
        prefill_step_size: int = 512,
        caching: CacheConfig | None = None,
        learner: Learner | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tokens = TokenBytes(tokenizer)
        self.config = config
        self.speculative = speculative
        self.caching = caching
        self.learner = learner
        self.prefill_step_size = prefill_step_size
        self.batch = make_batch(model, config, speculative, caching)
        own = partial(model.backbone.new_cache, caching)
        new_cache = own if self.batch is None else self.batch.new_cache
        self.prefixes = PrefixStore(new_cache, prompt_cache_bytes)
        self.reading: deque[RequestState] = deque()  # whose turn is next comes first
        self.writing: deque[RequestState] = deque()
        self.sequences: dict[BatchSequence, RequestState] = {}

    @property
    def requests(self) -> list[Request]:
        return [answer.request for answer in (*self.reading, *self.writing)]

    def warm_up(self) -> None:
        """Measure and compile what the first answer would otherwise wait for."""
        token_sampler = TokenSampler(history=[0])
        decoder = decoder_for(self.model, self.config, token_sampler, self.speculative)
        for _ in decoder.steps(0, self.prefixes.new_cache(), MaxTokens(1)):
            pass

    def begin(self, request: Request) -> None:
        """Take an answer on; its prompt is read after those that came before."""
        cache = self.prefixes.take(request.prompt)
        self.reading.append(
            RequestState(request, self.model, self.tokens, cache, self.prefill_step_size)
        )

    def end(self, request: Request) -> None:
        """Stop an answer and store what its cache holds, unless an error makes that doubtful."""
        answer = next(one for one in (*self.reading, *self.writing) if one.request is request)
        for line in (self.reading, self.writing):
            if answer in line:
                line.remove(answer)
        self._leave_batch(answer)
        if not answer.failed:
            answer.settle()
            self.prefixes.put(answer.prefix())
            if self.learner is not None and request.settings.grammar is None:
                self.learner.keep(request.prompt, answer.given)

    def step(self) -> list[tuple[Request, Event]]:
        """Read a chunk of one prompt, and let the answers that are being written have a pass."""
        events = self._read()
        writing = [answer for answer in self.writing if not answer.request.over]
        if not writing:
            return events
        if self.batch is None or len(writing) == 1:
            answer = writing[0]
            self.writing.remove(answer)
            self.writing.append(answer)
            return events + self._alone(answer)
        return events + self._together(self.batch)

    def _read(self) -> list[tuple[Request, Event]]:
        if not self.reading:
            return []
        answer = self.reading.popleft()
        try:
            if next(answer.reading, None) is not None:
                self.reading.append(answer)
                return []
            read = answer.request.prompt[:-1]
            if answer.request.shared:
                self.prefixes.put(PrefixCache(answer.cache.copy(len(read)), read))
        except Exception as error:
            self.reading.append(answer)
            return [self._failed(answer, error)]
        answer.begin()
        self.writing.append(answer)
        return []

    def _alone(self, answer: RequestState) -> list[tuple[Request, Event]]:
        """Give one answer a pass of a decoder of its own."""
        try:
            self._leave_batch(answer)
            result = answer.alone(partial(self._steps, answer))
            return [(answer.request, answer.progress(result))]
        except Exception as error:
            return [self._failed(answer, error)]

    def _steps(self, answer: RequestState) -> Iterator[StepResult]:
        decoder = decoder_for(
            self.model,
            self.config,
            answer.token_sampler,
            self.speculative,
            text=[*answer.request.prompt, *answer.given],
        )
        return decoder.steps(answer.root, answer.cache, answer)

    def _together(self, batch: BatchDecoder) -> list[tuple[Request, Event]]:
        """Give all answers a pass that they share."""
        joined = set(self.sequences.values())
        for answer in self.writing:
            if answer not in joined and not answer.request.over:
                answer.settle()
                sequence = batch.add(
                    [answer.root],
                    cache=answer.cache,
                    token_sampler=answer.token_sampler,
                    criteria=answer,
                    text=[*answer.request.prompt, *answer.given],
                )
                self.sequences[sequence] = answer
        events: list[tuple[Request, Event]] = []
        try:
            results = batch.step()
        except Exception as error:  # of all, such as no memory: nothing in the batch can be trusted
            lost = [self._failed(answer, error) for answer in self.sequences.values()]
            self.sequences.clear()
            self.batch = make_batch(self.model, self.config, self.speculative, self.caching)
            return lost
        for sequence, result, raised in results:
            answer = self.sequences[sequence]
            if raised is not None or result is None:
                events.append(self._failed(answer, raised or RuntimeError("no result")))
                continue
            try:
                events.append((answer.request, answer.progress(result)))
            except Exception as error:
                events.append(self._failed(answer, error))
        return events

    def _leave_batch(self, answer: RequestState) -> None:
        """Take an answer's cache back from the batch, if it is there."""
        for sequence, one in list(self.sequences.items()):
            if one is answer and self.batch is not None:
                del self.sequences[sequence]
                answer.cache = self.batch.remove(sequence)

    def _failed(self, answer: RequestState, error: Exception) -> tuple[Request, Event]:
        end_if_lost(error)
        answer.failed = True
        return answer.request, Failure.of(error)


def make_batch(
    model: StreamModel,
    config: DecodeConfig | None,
    speculative: bool,
    caching: CacheConfig | None = None,
) -> BatchDecoder | None:
    """Return what decodes several answers in one pass, None where that cannot be done."""
    if caching is not None and not caching.keeps_all:
        return None
    try:
        governor = governor_for(model, config) if speculative else None
        return BatchDecoder(model, config, speculative, governor=governor)
    except SpecStreamError as error:
        log.warning("note: answers take turns instead of sharing passes, because %s", error)
        return None
