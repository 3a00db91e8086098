"""One tree of looked-up continuations and another drafter's candidates, on the device.

The host knows the continuations, the device alone the other's candidates. So the tree is grown level
by level as always, and every kept node knows which continuation it stands for, if any:

    candidates of a parent = its continuations, and the drafter's with what those leave of the
                             probability; one that both name is one candidate with both shares

A continuation that the drafter thinks unlikely beside its own best, q(c) « q(best), is believed less:
its log-odds are lowered by `DOUBT` · log(q(best) / q(c)). That takes most from short matches against a
drafter that is sure, and little from long ones.

Below the drafter's last level the continuations go on alone, as host-known nodes that hang on
whatever of them was kept. Of all nodes together the best stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ....config import TreeSpec
from ...tree import LEVEL_COST, DraftTree, Proposer, best_rows, grow
from .continuations import Continuations

DOUBT = 0.15
_NEVER = -1e30  # of a score: what ranks below is no draft


def looked_up_tree(root: mx.array, found: Continuations) -> DraftTree:
    """Return the tree of the continuations alone below `root`, () or (1,) integers."""
    place = _by_depth(found)
    order = sorted(range(len(found)), key=lambda node: place[node])
    parents = [0 if (p := found.parents[n]) < 0 else 1 + place[p] for n in order]
    scores = [math.log(found.chances[n]) - LEVEL_COST * found.depths[n] for n in order]
    return DraftTree(
        mx.concatenate(
            [root.reshape(1).astype(mx.int32), mx.array([found.tokens[n] for n in order], mx.int32)]
        ),
        mx.array([0, *parents], mx.int32),
        mx.array([0, *(found.depths[n] for n in order)], mx.int32),
        depth=max(found.depths, default=0),
        scores=mx.array([0.0, *scores], mx.float32),
        looked_up=mx.array([False, *([True] * len(order))]),
    )


def merged_tree(
    root: mx.array,
    spec: TreeSpec,
    levels: int,
    propose: Proposer,
    before: mx.array,
    found: Continuations,
) -> DraftTree:
    """Return the best tree below `root` of another drafter's candidates and continuations.

    spec: rows and width; a chain is as long as its continuations. levels: of the other drafter.
    propose, before: as for `tree.build`.
    """
    merged = MergedProposer(propose, [found])
    tree, sizes = grow(root, spec, levels, merged, before)
    return best_rows(_with_tail(tree, sizes, merged, found), spec)


class MergedProposer:
    """Candidates of another drafter with looked-up ones among them.

    found: what follows each text, one for every parent of the first call. Tables have a row for
    each text's end, one for each continuation (the first text's from `first[0]` on, and so on), and
    one for nodes that are none; `rows` are of the parents of each call, `theirs` says of which
    continuations the other drafter is surer.
    """

    def __init__(self, propose: Proposer, found: Sequence[Continuations]) -> None:
        R, N = len(found), sum(map(len, found))
        self.propose, self.no_row = propose, R + N
        self.first = [R]
        children: list[list[int]] = [[] for _ in range(R + N + 1)]
        for text, one in enumerate(found):
            first = self.first[-1]
            for node, parent in enumerate(one.parents):
                children[text if parent < 0 else first + parent].append(first - R + node)
            self.first.append(first + len(one))
        width = max(1, *(len(own) for own in children))
        below = np.full((R + N + 1, width), N, np.int32)
        for row, own in enumerate(children):
            below[row, : len(own)] = own
        given = np.array([*(p for one in found for p in one.given), 0.0], np.float32)[below]
        with np.errstate(divide="ignore"):
            self.log_odds = mx.array(np.log(given) - np.log(np.maximum(1 - given, 1e-6)))
        self.below = mx.array(below + R)
        tokens = [*(token for one in found for token in one.tokens), 0]
        self.tokens = mx.array(np.array(tokens, np.int32)[below])
        self.rows: list[mx.array] = []
        self.theirs = mx.zeros((R + N + 1,), dtype=mx.bool_)

    def is_looked_up(self, rows: mx.array) -> mx.array:
        """Tell which of these rows are continuations that look-up is surer of."""
        continues = (rows >= self.first[0]) & (rows < self.no_row)
        return continues & ~mx.take(self.theirs, rows)

    def descend(self, tokens: mx.array, places: mx.array) -> mx.array:
        """Return the rows of kept nodes (W,), which were proposed below `places` of the last call."""
        above = mx.take(self.rows[-1], places)
        below = mx.take(self.below, above, axis=0)
        same = mx.take(self.tokens, above, axis=0) == tokens[:, None]
        return mx.min(mx.where(same, below, self.no_row), axis=-1)

    def __call__(
        self, level: int, parents: mx.array, before: mx.array, places: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return candidates (W, k + c) int32 and log-probabilities; -inf for what fills up."""
        ids, log_probs = self.propose(level, parents, before, places)
        ends = mx.arange(parents.shape[0], dtype=mx.int32)
        self.rows.append(ends if level == 0 else self.descend(parents, places))
        below, tokens, log_odds = (
            mx.take(table, self.rows[-1], axis=0)
            for table in (self.below, self.tokens, self.log_odds)
        )
        looked_up = log_odds > -mx.inf
        same = (ids[:, :, None] == tokens[:, None, :]) & looked_up[:, None, :]
        theirs = mx.max(mx.where(same, log_probs[:, :, None], -mx.inf), axis=1)
        least, best = (f(log_probs, axis=1, keepdims=True) for f in (mx.min, mx.max))
        doubt = DOUBT * (best - mx.maximum(theirs, least))
        given = mx.sigmoid(log_odds - mx.where(doubt > 0, doubt, 0.0))
        log_rest = mx.log(mx.maximum(1 - mx.sum(given, axis=1, keepdims=True), 1e-6))
        log_given, log_probs, theirs = mx.log(given), log_probs + log_rest, theirs + log_rest
        self.theirs[below.reshape(-1)] = (theirs >= log_given).reshape(-1)
        log_given = mx.where(looked_up, mx.logaddexp(log_given, theirs), -mx.inf)
        log_probs = mx.where(mx.any(same, axis=2), -mx.inf, log_probs)
        return (
            mx.concatenate([ids.astype(mx.int32), tokens], axis=1),
            mx.concatenate([log_probs, log_given], axis=1),
        )


def _with_tail(
    tree: DraftTree, sizes: Sequence[int], merged: MergedProposer, found: Continuations
) -> DraftTree:
    """Return the tree with the continuations that are deeper than it below its last level.

    sizes: nodes of each level of the tree.
    """
    assert tree.scores is not None
    last, T, place = len(sizes) - 1, tree.num_nodes, _by_depth(found)
    deep = sorted((n for n in range(len(found)) if found.depths[n] > last), key=place.__getitem__)
    # The rows that the last level's nodes stand for. A duplicate that only fills up is none.
    level = slice(T - sizes[-1], T)
    rows = mx.zeros((1,), dtype=mx.int32)
    if last:
        places = tree.parents[level] - (T - sizes[-1] - sizes[-2])
        rows = merged.descend(tree.tokens[level], places)
    rows = mx.where(tree.scores[level] > _NEVER, rows, merged.no_row)
    looked_up = merged.is_looked_up(mx.concatenate([*merged.rows, rows] if last else [rows]))
    tokens, parents, depths = tree.tokens, tree.parents, tree.depths
    scores, depth = tree.scores, tree.depth
    if deep:
        node_of_row = mx.full((merged.no_row + 1,), -1, dtype=mx.int32)
        node_of_row[rows] = mx.arange(level.start, T, dtype=mx.int32)
        new = {n: T + index for index, n in enumerate(deep)}
        hooks, ups, gains = [], [], []
        for n in deep:
            hook, gain = n, 0.0  # the continuation of the last level that n hangs on
            while hook >= 0 and found.depths[hook] > last:
                gain += math.log(found.given[hook]) - LEVEL_COST
                hook = found.parents[hook]
            hooks.append(hook + 1)
            gains.append(gain)
            ups.append(new.get(found.parents[n], -1))
        at, up = mx.take(node_of_row, mx.array(hooks, mx.int32)), mx.array(ups, mx.int32)
        reached = mx.where(at < 0, -mx.inf, mx.take(scores, mx.maximum(at, 0)))
        up = mx.where(at < 0, 0, mx.where(up < 0, at, up))
        tokens = mx.concatenate([tokens, mx.array([found.tokens[n] for n in deep], mx.int32)])
        parents = mx.concatenate([parents, up])
        depths = mx.concatenate([depths, mx.array([found.depths[n] for n in deep], mx.int32)])
        scores = mx.concatenate([scores, reached + mx.array(gains, mx.float32)])
        looked_up = mx.concatenate([looked_up, mx.ones((len(deep),), dtype=mx.bool_)])
        depth = max(found.depths)
    return DraftTree(
        tokens, parents, depths, depth, alive=scores > _NEVER, scores=scores, looked_up=looked_up
    )


def _by_depth(found: Continuations) -> list[int]:
    """Return each node's place when sorted by depth, then as they are."""
    order = sorted(range(len(found)), key=lambda node: found.depths[node])
    place = [0] * len(found)
    for index, node in enumerate(order):
        place[node] = index
    return place
