"""Acceptance by sample-and-match: exactly lossless for any tree and any pruning.

At every node the target's own token is drawn, from the same distribution plain decoding would
draw it from (greedy: the argmax). The walk starts at the root, goes to the child that holds the
drawn token and stops when there is none; that token is the next root. Whatever the tree holds,
the tokens that come out are the target's draws, one per position, each made with the right
history: the tree decides only how many of them one pass yields.

The paper's per-path rejection rule [SS Eq. 7-8] is not exact with top-k trees.

Typical acceptance, which also takes likely drafts that were not drawn, changes the distribution
and is lossy; it is there for those who ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..config import TypicalSpec
from .tree import DraftTree, ints


@dataclass(frozen=True)
class AcceptedPath:
    """What one step accepted, on the device.

    node: () int32, the deepest accepted node. length: () int32, accepted drafts (its depth).
    nodes: (depth + 1,) int32, the path from the root in its first `length` + 1 places, then
    padding. tokens: (depth + 1,) int32, the target's draw at each of `nodes`; the first
    `length` + 1 are the step's output, the last of them is the next root.
    """

    node: mx.array
    length: mx.array
    nodes: mx.array
    tokens: mx.array

    @property
    def next_root(self) -> mx.array:
        """Return the token drawn at the deepest accepted node, () int32."""
        return mx.take(self.tokens, self.length)


def accept(tree: DraftTree, ancestor_mask: mx.array, drawn: mx.array) -> AcceptedPath:
    """Return the longest root path whose tokens the target drew.

    Args:
        ancestor_mask: (T, T) bool of `tree`.
        drawn: (T,) integer, the target's token at every node.
    """
    drawn = drawn.astype(mx.int32)
    if tree.is_chain:
        return _accept_chain(tree, drawn)
    right = mx.take(drawn, tree.parents) == tree.tokens
    if tree.alive is not None:
        right = right & tree.alive
    right = right | (tree.depths == 0)
    # A node is accepted when it and all its ancestors are right.
    accepted = mx.all(mx.where(ancestor_mask, right, True), axis=1)
    node = mx.argmax(mx.where(accepted, tree.depths, -1)).view(mx.int32)
    on_path = mx.take(ancestor_mask, node, axis=0)
    nodes = mx.argsort(mx.where(on_path, tree.depths, tree.depth + 1)).view(mx.int32)
    nodes = nodes[: tree.depth + 1]
    return AcceptedPath(node, mx.take(tree.depths, node), nodes, mx.take(drawn, nodes))


def _accept_chain(tree: DraftTree, drawn: mx.array) -> AcceptedPath:
    """Return the same of a chain, whose nodes are its path."""
    nodes = ints(tuple(range(tree.num_nodes)))
    if tree.depth == 0:
        return AcceptedPath(nodes[0:1].squeeze(0), nodes[0:1].squeeze(0), nodes, drawn)
    right = drawn[:-1] == tree.tokens[1:]
    if tree.alive is not None:
        right = right & tree.alive[1:]
    length = mx.min(mx.where(right, tree.depth, nodes[:-1]))  # the first that is not
    return AcceptedPath(length, length, nodes, drawn)


def typical_choice(
    spec: TypicalSpec, logits: mx.array, tokens: mx.array, children: mx.array, drawn: mx.array
) -> mx.array:
    """Return the token (1,) that follows a node: its likeliest typical child's, else `drawn`.

    A child is typical when its probability p > min(epsilon, delta * exp(-entropy)).

    Args:
        logits: (1, V), the node's, processed. tokens: (T,) int32, the tree's.
        children: (T,) bool, which nodes are the node's children. drawn: (1,) int32.
    """
    log_probs = logits.astype(mx.float32).squeeze(0)
    log_probs = log_probs - mx.logsumexp(log_probs)
    probabilities = mx.exp(log_probs)
    # A forbidden token adds nothing: 0 · log 0 is 0.
    entropy = -mx.sum(mx.where(probabilities > 0, probabilities * log_probs, 0.0))
    threshold = mx.minimum(spec.epsilon, spec.delta * mx.exp(-entropy))
    scores = mx.where(children, mx.take(probabilities, tokens), 0.0)
    best = mx.argmax(scores)
    typical = mx.take(scores, best) > threshold
    return mx.where(typical, mx.take(tokens, best), drawn).astype(mx.int32)
