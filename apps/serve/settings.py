"""How one answer's tokens are drawn: mlx-lm's samplers and processors, with a seed of its own.

mlx-lm draws from one global random state, which requests would share. Here every answer has its own
key, so a seed gives the same answer whatever else is being generated.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_specstream.grammar import Grammar
from mlx_specstream.sampling import LogitsProcessor, Sampler

GREEDY_BELOW = 1e-3  # temperatures below this overflow when logits are divided by them


@dataclass(frozen=True)
class Settings:
    """What a request asks of its answer; the words are OpenAI's, those it lacks mlx-lm's.

    logprobs: how many alternatives to report with every token, None for no log-probabilities.
    grammar: what the answer must fit.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    grammar: Grammar | None = None

    def sampler(self, vocab_size: int) -> Sampler | None:
        """Return what draws tokens; None takes the likeliest."""
        if self.temperature < GREEDY_BELOW or self.top_p <= 0 or self.top_k == 1:
            return None
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return SeededSampler(self, vocab_size, seed)

    def processors(self, before: Sequence[int]) -> list[LogitsProcessor]:
        """Return mlx-lm's logits processors, that also see the tokens `before` those they are given.

        So that penalties do not depend on how much of the prompt a KV cache held.
        """
        from mlx_lm.sample_utils import make_logits_processors

        made = make_logits_processors(
            self.logit_bias,
            self.repetition_penalty if self.repetition_penalty != 1 else None,
            self.repetition_context_size,
            self.presence_penalty,
            self.presence_context_size,
            self.frequency_penalty,
            self.frequency_context_size,
        )
        # The grammar comes last: what it forbids, no bias may allow. It sees the answer alone.
        last: list[LogitsProcessor] = [] if self.grammar is None else [self.grammar.processor()]
        if not before:
            return [*made, *last]
        past = mx.array(list(before), dtype=mx.int32)

        def with_past(process: LogitsProcessor) -> LogitsProcessor:
            return lambda tokens, logits: process(mx.concatenate([past, tokens]), logits)

        return [*(with_past(process) for process in made), *last]


class SeededSampler:
    """mlx-lm's sampler with a random key of its own: log-probabilities (T, V) to tokens (T,)."""

    def __init__(self, settings: Settings, vocab_size: int, seed: int) -> None:
        self.settings = settings
        self.vocab_size = vocab_size
        self.key = mx.random.key(seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draw a token per row, filtered in mlx-lm's order."""
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

        wanted = self.settings
        if wanted.top_p < 1:
            logprobs = apply_top_p(logprobs, wanted.top_p)
        if wanted.min_p > 0:
            logprobs = apply_min_p(logprobs, wanted.min_p)
        if 0 < wanted.top_k < self.vocab_size:
            logprobs = apply_top_k(logprobs, wanted.top_k)
        self.key, now = mx.random.split(self.key)
        return mx.random.categorical(logprobs * (1 / wanted.temperature), key=now)
