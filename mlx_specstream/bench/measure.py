"""One answer, timed: prefill and decoding apart, with what every pass gave.

The clock of prefill runs from the call to the first token, which the first pass gives; that of
decoding from the first token to the last. So one token's pass counts as prefill for every method.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_specstream.config import DecodeConfig
from mlx_specstream.generation import stream_generate
from mlx_specstream.statistics import SpeculationStats

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_specstream.loading import StreamModel


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


def answer_with_ours(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    max_tokens: int,
    config: DecodeConfig | None,
) -> Answered:
    """Answer greedily with our loop: speculatively with `config`, plainly if it is None."""
    options = {"config": config, "speculative": config is not None}
    answered, before = Answered(), SpeculationStats()
    responses = stream_generate(model, tokenizer, prompt, max_tokens, **options)  # type: ignore[arg-type]
    for response in _timed(responses, answered):
        if response.stats is not before:
            accepted = response.stats.accepted - before.accepted
            answered.count(accepted, response.stats.drafted - before.drafted)
            before = response.stats
    return answered


def answer_with_mlx_lm(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    max_tokens: int,
    draft_model: nn.Module | None = None,
    num_draft_tokens: int = 0,
) -> Answered:
    """Answer greedily with mlx-lm, with its speculative decoding if there is a draft model."""
    import mlx_lm

    options: dict[str, Any] = {"max_tokens": max_tokens}
    if draft_model is not None:
        options |= {"draft_model": draft_model, "num_draft_tokens": num_draft_tokens}
    answered, accepted = Answered(), 0
    for response in _timed(
        mlx_lm.stream_generate(model, tokenizer, list(prompt), **options), answered
    ):
        if response.from_draft:
            accepted += 1
            continue
        answered.count(accepted, num_draft_tokens)
        accepted = 0
    if accepted:  # the answer ended among the drafts of a pass
        answered.count(accepted, num_draft_tokens)
    return answered


def _timed(responses: Iterator[Any], answered: Answered) -> Iterator[Any]:
    """Pass responses on, noting tokens, text and times; begin and end with an idle device."""
    from mlx_lm.generate import generation_stream

    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    started = first = last = time.perf_counter()
    for response in responses:
        last = time.perf_counter()
        if not answered.tokens:
            first = last
        answered.tokens.append(int(response.token))
        answered.pieces.append(response.text)
        yield response
    answered.prefill_s, answered.decode_s = first - started, last - first
    # mlx-lm has scheduled a pass more than it needs; nobody else is to pay for it.
    mx.synchronize(generation_stream)
    mx.synchronize()
    answered.peak_bytes = mx.get_peak_memory()
