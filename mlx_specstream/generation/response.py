"""What a caller gets for every token: mlx-lm's fields, and the figures of speculation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from ..speculation.result import DraftRecord
from ..speculation.statistics import SpeculationStats
from .text import FinishReason

FEWEST_TIMED = 3  # tokens or passes; the rate of fewer says how fast a clock is, not a model


@dataclass(frozen=True)
class GenerationResponse:
    """One token with the text it completes: mlx-lm's fields, and the figures of speculation.

    text: may be empty, for a character or a stop string may still be incomplete. origin: who
    proposed the token, its stream 1..γ, -1 for look-up, or 0 for the main stream. stats: figures up to and
    including the pass this token came from. draft: the tree that pass verified, if drafts were
    asked for. logits: (V,), before processors, on the device.
    finish_reason: `stop` (end of turn, stop string), `length`, or None before the last token.
    """

    text: str
    token: int
    origin: int
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: FinishReason | None
    stats: SpeculationStats
    draft: DraftRecord | None = field(repr=False)
    logits: mx.array = field(repr=False)
    processed: Callable[[mx.array], mx.array] = field(repr=False)

    @property
    def from_draft(self) -> bool:
        """Tell whether a draft had proposed the token."""
        return self.origin != 0

    @property
    def prompt_rate(self) -> float | None:
        """Return prompt tokens per second, None of a prompt too short to tell."""
        return self.prompt_tps if self.prompt_tokens >= FEWEST_TIMED else None

    @property
    def generation_rate(self) -> float | None:
        """Return tokens per second, None after too few passes to tell (the first is not timed)."""
        return self.generation_tps if self.stats.passes >= FEWEST_TIMED else None

    @property
    def logprobs(self) -> mx.array:
        """Return the target's log-probabilities (V,), computed when asked for."""
        logits = self.processed(self.logits)
        return logits - mx.logsumexp(logits, keepdims=True)


def summary(response: GenerationResponse) -> str:
    """Return the figures of an answer's last response in lines, mlx-lm's first."""
    lines = [
        f"Prompt: {_counted(response.prompt_tokens, response.prompt_rate)}",
        f"Generation: {_counted(response.generation_tokens, response.generation_rate)}",
        f"Peak memory: {response.peak_memory:.3f} GB",
    ]
    if response.stats.drafted:
        lossy = " (lossy)" if response.stats.lossy else ""
        lines.append(f"Speculation{lossy}: {response.stats}")
    return "\n".join(lines)


def _counted(tokens: int, rate: float | None) -> str:
    return f"{tokens} tokens" + ("" if rate is None else f", {rate:.3f} tokens-per-sec")
