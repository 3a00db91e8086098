"""What a caller gets for every token: mlx-lm's fields, and the figures of speculation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from ..speculation.result import DraftRecord
from ..speculation.statistics import SpeculationStats
from .text import FinishReason


@dataclass(frozen=True)
class GenerationResponse:
    """One token with the text it completes: mlx-lm's fields, and the figures of speculation.

    text: may be empty, for a character or a stop string may still be incomplete. origin: who
    proposed the token, its stream 1..γ, or 0 for the main stream. stats: figures up to and
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
        """Tell whether a stream had proposed the token."""
        return self.origin > 0

    @property
    def logprobs(self) -> mx.array:
        """Return the target's log-probabilities (V,), computed when asked for."""
        logits = self.processed(self.logits)
        return logits - mx.logsumexp(logits, keepdims=True)


def summary(response: GenerationResponse) -> str:
    """Return the figures of an answer's last response in lines, mlx-lm's first."""
    lines = [
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec",
        (
            f"Generation: {response.generation_tokens} tokens, "
            f"{response.generation_tps:.3f} tokens-per-sec"
        ),
        f"Peak memory: {response.peak_memory:.3f} GB",
    ]
    if response.stats.drafted:
        lossy = " (lossy)" if response.stats.lossy else ""
        lines.append(f"Speculation{lossy}: {response.stats}")
    return "\n".join(lines)
