"""A request in a batch, from waiting for its prompt to the cache it leaves with.

    waiting ──► running ──► finished (its `criteria` have enough)
                   └──────► failed   (NaN, or what its sampler or `criteria` raised)

In whatever state it is, `BatchDecoder.remove` takes it out, which makes it `removed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..model.cache import KVCache
from ..speculation.drafters.lookup import LookUp
from ..speculation.result import StepResult, StopCriteria
from ..speculation.sampling import TokenSampler

State = Literal["waiting", "running", "finished", "failed", "removed"]


@dataclass(eq=False)
class BatchSequence:
    """A request in the batch: what `BatchDecoder.add` returns, to be used as a handle.

    state: `waiting` (prompt being computed), `running`, `finished` (its `criteria` have enough),
    `failed` or `removed`. cache: its text while it is not in the batch. pending_prompt: prompt
    tokens to come, the last of which is the first step's root. root: the text's last token, which
    is not in any cache. row: its row in the batch while it runs. drafted: its row among the drafts of
    the last step, None before its first one. lookup: looks its text's end up, if anything does.
    """

    token_sampler: TokenSampler
    cache: KVCache
    pending_prompt: list[int]
    criteria: StopCriteria
    prompt_tokens: int
    root: int
    lookup: LookUp | None = None
    state: State = "waiting"
    row: int = -1
    drafted: int | None = None

    @property
    def prefilled(self) -> int:
        """Return how many prompt tokens have been computed; the last one is in the first step."""
        return self.prompt_tokens - len(self.pending_prompt)


class BatchEvent(NamedTuple):
    """What a step brought for one sequence: a result, or the error that ended the sequence."""

    sequence: BatchSequence
    result: StepResult | None
    error: Exception | None
