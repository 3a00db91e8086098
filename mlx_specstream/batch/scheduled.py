"""A pass that has been scheduled: whose rows it has, and what it decided for each of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..speculation.result import DraftRecord, StepResult, Verdict, to_ints
from .chains import Chains
from .sequence import BatchSequence
from .step import BatchStep


@dataclass
class ScheduledPass:
    """A step under way, and what is known of it on the host.

    chains: what it verifies, row by row for `sequences`. lengths: of their texts before it. drafting:
    whether it drafts the next chains. drafted: how many drafts of its own chains are the streams'.
    widened: rows of its chains where look-up made them longer, else 0. promised: drafts of each chain
    that look-up alone should have right.
    """

    step: BatchStep
    sequences: list[BatchSequence]
    chains: Chains
    lengths: list[int]
    drafting: bool
    drafted: int
    widened: int
    promised: list[float]

    def result(self, row: int, verdict: Verdict, *, keep_drafts: bool) -> StepResult:
        """Return what the pass decided for a row; `keep_drafts` puts its chain into that."""
        tokens, nodes = verdict.tokens, self.chains.lengths[row]
        draft, flags = None, self.chains.looked_up
        if keep_drafts:
            looked_up = [] if flags is None else to_ints(flags[row, :nodes])
            draft = DraftRecord(
                verdict.chain[:nodes],
                [max(node - 1, 0) for node in range(nodes)],
                list(range(nodes)),
                verdict.nodes,
                tuple(node for node, by in enumerate(looked_up) if by),
            )
        logits = self.step.logits[row, : len(tokens)]
        return StepResult(tokens, nodes - 1, logits, draft, looked_up=verdict.looked_up)
