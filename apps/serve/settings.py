"""What a request asks of its answer: how tokens are drawn, and what ends it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from ...config import SamplingConfig
from ...generation.grammar import Grammar
from ...speculation.sampling import LogitsProcessor, Sampler
from ..thinking import ContentStops, ThoughtMarks

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class Settings:
    """What a request asks of its answer; the words are OpenAI's, those it lacks mlx-lm's.

    logprobs: how many alternatives to report with every token, None for no log-probabilities.
    grammar: what the answer must fit. thoughts: whose text stop strings do not end.
    continues: the answer goes on with the prompt's text, a first blank included.
    stop_token_ids: further tokens that end it. min_tokens: before so many no token ends it;
    ignore_eos: the model's own ones never do. Such tokens are not drawn.
    """

    max_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None
    thoughts: ThoughtMarks | None = None
    continues: bool = False

    def stops(self, prompt: Sequence[int]) -> Sequence[str] | ContentStops:
        """Return what ends the answer to a prompt of ids."""
        if self.thoughts is None or not self.stop:
            return self.stop
        return ContentStops(self.stop, self.thoughts, inside=self.thoughts.left_open(prompt))

    def sampler(self, vocab_size: int, tokenizer: TokenizerWrapper) -> Sampler | None:
        """Return what draws tokens; None takes the likeliest."""
        sampling = self.sampling
        if sampling.top_k >= vocab_size:  # more than there are: all
            sampling = replace(sampling, top_k=0)
        sampler: Sampler | None = sampling.sampler(vocab_size, tokenizer)
        return sampler

    def ends(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """Return the tokens that end the answer of a model with such ends."""
        return self.stop_token_ids.union(eos_token_ids)

    def processors(
        self, before: Sequence[int], eos_token_ids: Collection[int] = ()
    ) -> list[LogitsProcessor]:
        """Return mlx-lm's logits processors, that also see the tokens `before` those they are given.

        So that penalties do not depend on how much of the prompt a KV cache held. They are given
        the prompt's last token and the answer.
        """
        made = self.sampling.processors()
        # The grammar comes last: what it forbids, no bias may allow. It sees the answer alone.
        last: list[LogitsProcessor] = [] if self.grammar is None else [self.grammar.processor()]
        if self.ignore_eos and eos_token_ids:
            last.append(_without(eos_token_ids))
        if self.min_tokens and (ends := self.ends(eos_token_ids)):
            last.append(_without(ends, self.min_tokens))
        if not before:
            return [*made, *last]
        past = mx.array(list(before), dtype=mx.int32)

        def with_past(process: LogitsProcessor) -> LogitsProcessor:
            return lambda tokens, logits: process(mx.concatenate([past, tokens]), logits)

        return [*(with_past(process) for process in made), *last]


def _without(tokens: Collection[int], until: int | None = None) -> LogitsProcessor:
    """Return what keeps tokens from being drawn, until an answer has so many."""
    ids = mx.array(sorted(tokens), dtype=mx.int32)

    def process(text: mx.array, logits: mx.array) -> mx.array:
        if until is not None and text.shape[0] > until:  # the prompt's last token is among them
            return logits
        return mx.put_along_axis(logits, ids[None], mx.array(-mx.inf, logits.dtype), axis=-1)

    return process
