"""Early-exit pruning: cut unlikely nodes before the streams join [SS §3.1.3].

After the lower layers, a rank-8 map and the model's own norm and head guess what the main
stream will choose: z = H(norm(o(M))) with o(M) = M + B·A·M. A child's probability given its
parent, and the product of these along its path, say which nodes are worth the upper layers.

Probabilities are over the whole vocabulary, so that a threshold means the same in every tree: the
rows that may be parents go through the full head, leaves do not (of a 3³ tree 13 of 40 do). Among
the tree's tokens alone they would depend on which others were drafted, and on how often. Pruning
is exactly lossless: a node that is cut cannot be accepted, and acceptance asks nothing else of a
tree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from ..config import PruneSpec
from ..model.backbone import Backbone
from .tree import DraftTree, best_nodes, select

_NEVER = -1e9
_LEVEL_COST = 1e-4  # keeps parents before children of equal score


@dataclass(frozen=True)
class Pruner:
    """The early-exit map o(M) = M + (M·A)·B: lora_a (h, r), lora_b (r, h)."""

    lora_a: mx.array
    lora_b: mx.array

    def child_log_probs(self, backbone: Backbone, tree: DraftTree, main: mx.array) -> mx.array:
        """Return each node's early-exit log-probability given its parent, (T,) float32, root 0.

        main: (1, T, h), the rows at the input of the first MSA layer.
        """
        main = main[:, : max(tree.num_nodes - tree.num_leaves, 1)]
        exit_state = backbone.norm(mx.addmm(main, main @ self.lora_a, self.lora_b))
        logits = backbone.head(exit_state).squeeze(0).astype(mx.float32)
        totals = mx.logsumexp(logits, axis=-1)
        log_probs = logits[tree.parents, tree.tokens] - mx.take(totals, tree.parents)
        nodes = mx.arange(tree.num_nodes, dtype=mx.int32)
        return mx.where(nodes == 0, 0.0, log_probs)


def prune(
    tree: DraftTree, child_log_probs: mx.array, spec: PruneSpec
) -> tuple[DraftTree, mx.array]:
    """Return the tree of the best `spec.keep` nodes and their old indices, ascending.

    A node ranks by the product of probabilities along its path, so a node never outranks its
    ancestors. Nodes below the threshold, and their descendants, are kept only to fill the fixed
    shape and are marked not alive.
    """
    keep = min(spec.keep, tree.num_nodes)
    paths = path_scores(tree, child_log_probs, spec.threshold)
    if spec.threshold > 0:
        alive = paths > _NEVER / 2
        tree = replace(tree, alive=alive if tree.alive is None else tree.alive & alive)
    if keep == tree.num_nodes:
        return tree, mx.arange(tree.num_nodes, dtype=mx.int32)
    kept = best_nodes(paths, keep)
    return select(tree, kept), kept


def path_scores(tree: DraftTree, child_log_probs: mx.array, threshold: float = 0.0) -> mx.array:
    """Return what nodes are ranked by, (T,) float32: sums of log-probabilities along their paths.

    Those below the threshold, and their descendants, are far below all others.
    """
    step = mx.maximum(child_log_probs, -1e3) - _LEVEL_COST
    if threshold > 0:
        low = (child_log_probs < mx.log(mx.array(threshold))) & (tree.depths > 0)
        step = mx.where(low, _NEVER, step)
    own = mx.where(mx.arange(tree.num_nodes, dtype=mx.int32) == 0, 0.0, step)
    paths, parents = own, tree.parents
    for _ in range(max(tree.depth - 1, 0)):
        # The root adds nothing, so walking on from it is harmless.
        paths = paths + mx.take(own, parents)
        parents = mx.take(tree.parents, parents)
    return paths
