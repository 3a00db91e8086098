"""One answer, timed: prefill and decoding apart, with what every pass gave.

The clock of prefill runs from the call to the first token, which the first pass gives; that of
decoding from the first token to the last. So one token's pass counts as prefill for every method.

An answer can stop after any token and go on later, so that several are decoded in turns. Every
turn begins and ends with an idle device: what is scheduled in it is paid in it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from ..config import DecodeConfig
from ..generation.generate import stream_generate
from ..speculation.statistics import SpeculationStats

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..loading.load import StreamModel


@dataclass
class Answered:
    """An answer with its times in seconds and the most memory MLX held, in bytes.

    passes: of the large model, after the prompt's. by_accepted: entry n counts the passes that
    verified drafts and accepted n of them.
    """

    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    passes: int = 0
    drafted: int = 0
    by_accepted: list[int] = field(default_factory=list)
    peak_bytes: int = 0

    def count(self, accepted: int, drafted: int) -> None:
        """Count one pass more."""
        self.passes += 1
        self.drafted += drafted
        if drafted:
            missing = accepted + 1 - len(self.by_accepted)
            self.by_accepted += [0] * missing
            self.by_accepted[accepted] += 1


@dataclass
class TimedAnswer:
    """An answer under way.

    responses: mlx-lm's or ours, one a token, not begun yet. Answers that take turns are all made
    before the first of them begins, so that each knows how much memory is everyone's.
    """

    responses: Iterator[Any]
    answered: Answered = field(default_factory=Answered)
    _stream: mx.Stream | None = None
    _shared: int = field(default_factory=mx.get_active_memory)  # bytes: the weights
    _own: int = 0  # bytes: the KV cache, above all

    def advance(self, tokens: int | None = None) -> bool:
        """Decode so many tokens more, all if None; tell whether the answer goes on."""
        others = mx.get_active_memory() - self._shared - self._own
        # mlx-lm's generators leave their stream the default one while they are stopped.
        outer = mx.default_stream(mx.default_device())
        mx.set_default_stream(self._stream or outer)
        mx.reset_peak_memory()
        try:
            return self._decode(tokens)
        finally:
            # mlx-lm has scheduled a pass more than it needs; nobody else is to pay for it.
            _wait()
            self._stream = mx.default_stream(mx.default_device())
            mx.set_default_stream(outer)
            peak = mx.get_peak_memory() - others
            self.answered.peak_bytes = max(self.answered.peak_bytes, peak)
            self._own = mx.get_active_memory() - self._shared - others

    def _decode(self, tokens: int | None) -> bool:
        answered = self.answered
        begun = last = time.perf_counter()
        for taken, response in enumerate(self.responses, start=1):
            last = time.perf_counter()
            if not answered.tokens:
                answered.prefill_s, begun = last - begun, last
            answered.tokens.append(int(response.token))
            answered.pieces.append(response.text)
            if taken == tokens:
                _wait()
                answered.decode_s += time.perf_counter() - begun
                return True
        answered.decode_s += last - begun
        return False


def in_turns(
    answers: Sequence[TimedAnswer], tokens: int, on_end: Callable[[], None] = lambda: None
) -> None:
    """Decode all answers, so many tokens of each at a time (0: each as a whole).

    Whoever goes first in one round goes last in the next. `on_end` is told of each that is over.
    """
    gc.collect()
    mx.clear_cache()
    going = list(answers)
    while going:
        still = []
        for answer in going:
            if answer.advance(tokens or None):
                still.append(answer)
            else:
                on_end()
        going = [*still[1:], *still[:1]]


def ours(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    max_tokens: int,
    config: DecodeConfig | None,
) -> TimedAnswer:
    """Return a greedy answer of our loop: speculative with `config`, plain if it is None."""
    answered = Answered()

    def responses() -> Iterator[Any]:
        options = {"config": config, "speculative": config is not None}
        before = SpeculationStats()
        for response in stream_generate(model, tokenizer, prompt, max_tokens, **options):  # type: ignore[arg-type]
            if response.stats is not before:
                accepted = response.stats.accepted - before.accepted
                answered.count(accepted, response.stats.drafted - before.drafted)
                before = response.stats
            yield response

    return TimedAnswer(responses(), answered)


def mlx_lms(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    max_tokens: int,
    draft_model: nn.Module | None = None,
    num_draft_tokens: int = 0,
) -> TimedAnswer:
    """Return a greedy answer of mlx-lm, of its speculative decoding if there is a draft model."""
    import mlx_lm

    options: dict[str, Any] = {"max_tokens": max_tokens}
    if draft_model is not None:
        options |= {"draft_model": draft_model, "num_draft_tokens": num_draft_tokens}
    answered = Answered()

    def responses() -> Iterator[Any]:
        accepted = 0
        for response in mlx_lm.stream_generate(model, tokenizer, list(prompt), **options):
            if response.from_draft:
                accepted += 1
            else:
                answered.count(accepted, num_draft_tokens)
                accepted = 0
            yield response
        if accepted:  # the answer ended among the drafts of a pass
            answered.count(accepted, num_draft_tokens)

    return TimedAnswer(responses(), answered)


def _wait() -> None:
    """Wait until the device has nothing left to do."""
    from mlx_lm.generate import generation_stream

    mx.synchronize(generation_stream)
    mx.synchronize()
