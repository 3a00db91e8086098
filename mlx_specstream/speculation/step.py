"""One step: verify the last draft and speculate the next, in one graph.

    tree of T nodes ──► the model, and what the drafter runs beside it ──► LM head ──► accept
                                                                                         │
    next tree ◄── candidates, level by level ◄── the drafter, below the accepted node ◄──┘

What verifies and proposes is in `drafters/`. Nothing here waits for the device: shapes depend on
the configuration and the committed length.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..config import TreeSpec
from ..model.cache import KVCache
from .accept import accept
from .drafters import Drafter
from .drafters.lookup import Continuations, looked_up_tree, merged_tree
from .result import StepReport, Verdict
from .sampling import TokenSampler
from .tree import DraftTree, Proposer, build, root_only

REWRITTEN_AT_ONCE = 32 << 20
"""Bytes of keys and values up to which drafting may rewrite buffers that are still being read.

A GPU's command buffer holds what it reads until it has run, and what is held is copied when it is
updated: keys and values of whole layers, if streams are put behind them before the verifying pass
is over. So from here on drafting begins when that pass has been read. Below, copying takes less time
than the device would stand idle until the host has come round to it.
"""


@dataclass
class Step:
    """A step as a graph that has not been waited for.

    tree: what it verifies. logits: (depth + 1, V), the target's at the path's nodes. next_tree:
    what the next step verifies. expected: see `StepResult`. proposer: the candidates that
    `next_tree` was built of, None without any. before: () int32, the token before its root.
    drafts_late: begin to draft when the report has been read, not before.
    """

    tree: DraftTree
    report: StepReport
    logits: mx.array
    next_tree: DraftTree
    expected: mx.array | None = None
    proposer: Proposer | None = None
    before: mx.array | None = None
    drafts_late: bool = False

    def schedule(self) -> None:
        """Start computing the step, then what the next one builds on.

        Apart, for what is evaluated together is ready together: so the host reads the report
        while the device is still running the streams and drafting the next tree.
        """
        mx.async_eval(self.report.packed, self.logits)
        if not self.drafts_late:
            self._draft()

    def read(self) -> Verdict:
        """Wait for the device, the loop's one synchronisation, and return what the step decided."""
        verdict = self.report.read()[0]
        if self.drafts_late:
            self._draft()
        return verdict

    def _draft(self) -> None:
        """Start computing what the next step builds on."""
        expected = [] if self.expected is None else [self.expected]
        mx.async_eval(*self.next_tree.arrays, *expected)


@dataclass(frozen=True)
class Stepper:
    """The parts that steps are made of, for one drafter and one configuration."""

    drafter: Drafter
    tree: TreeSpec
    token_sampler: TokenSampler

    def step(self, tree: DraftTree, cache: KVCache) -> Step:
        """Return the graph of one step over `tree`, whose root follows the committed text.

        New rows are scratch behind the committed text until the loop has read the report. Where
        drafts would see the cache turned quantised and the root not yet, the root goes alone.
        """
        if cache.quantises_before(tree.depth):
            tree = root_only(tree.tokens[:1])
        verified = self.drafter.verify(tree, cache)
        tree = verified.tree
        logits = self.drafter.backbone.head(verified.last).squeeze(0)
        drawn, finite = self.token_sampler(logits, tree)
        path = accept(tree, verified.seen, drawn)

        proposer = self.drafter.propose(verified, path, cache, self.tree)
        last = mx.take(tree.tokens, path.node)
        next_tree = root_only(path.next_root)
        if proposer is not None:
            next_tree = build(path.next_root, self.tree, self.drafter.depth, proposer, last)

        lower_rows = verified.lower_rows
        report = StepReport.of(
            accepted=path.length,
            finite=finite,
            tokens=path.tokens,
            nodes=path.nodes,
            lower_rows=None if lower_rows is None else mx.take(lower_rows, path.nodes),
            stream_nodes=verified.drafting_nodes,
            looked_up=None if tree.looked_up is None else mx.take(tree.looked_up, path.nodes),
        )
        if not tree.is_chain:
            logits = mx.take(logits, path.nodes, axis=0)
        late = self.drafter.rewritten_bytes(verified, cache) > REWRITTEN_AT_ONCE
        return Step(tree, report, logits, next_tree, next_tree.expected(), proposer, last, late)

    def with_look_up(self, step: Step, root: int, found: Continuations) -> DraftTree:
        """Return the tree after `step`, whose last token is `root`, with continuations in it."""
        token = mx.array(root, dtype=mx.int32)
        if step.proposer is None or step.before is None:
            return looked_up_tree(token, found)
        return merged_tree(token, self.tree, self.drafter.depth, step.proposer, step.before, found)
