"""Draft trees the slow way: best first from a heap, ancestors by walking up."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

# (depth of the node from 0, its token) -> its candidates, best first: [(token, log-probability)]
Candidates = Callable[[int, int], list[tuple[int, float]]]


@dataclass(frozen=True)
class Node:
    """A node by its path of tokens, root included, and the sum of log-probabilities."""

    path: tuple[int, ...]
    score: float


def best_first(root: int, rows: int, depth: int, branching: int, propose: Candidates) -> list[Node]:
    """Return the `rows` nodes of the highest score, best first; only nodes on the frontier wait.

    Between equal scores the shallower node is taken first, so no child precedes its parent.
    """
    heap: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, (root,))]
    taken: list[Node] = []
    while heap and len(taken) < rows:
        cost, level, path = heapq.heappop(heap)
        taken.append(Node(path, -cost))
        if level < depth:
            for token, log_prob in propose(level, path[-1])[:branching]:
                heapq.heappush(heap, (cost - log_prob, level + 1, (*path, token)))
    return taken


def product(root: int, depth: int, branching: int, propose: Candidates) -> list[Node]:
    """Return the nodes of the full tree."""
    taken = level = [Node((root,), 0.0)]
    for above in range(depth):
        level = [
            Node((*node.path, token), node.score + log_prob)
            for node in level
            for token, log_prob in propose(above, node.path[-1])[:branching]
        ]
        taken = taken + level
    return taken


def ancestors(parents: list[int]) -> list[list[bool]]:
    """Return who sees whom by walking up from every node."""
    mask = [[False] * len(parents) for _ in parents]
    for node in range(len(parents)):
        at = node
        mask[node][at] = True
        while at:
            at = parents[at]
            mask[node][at] = True
    return mask


def paths(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    """Return every node's path of tokens from the root."""
    found: list[tuple[int, ...]] = []
    for node, token in enumerate(tokens):
        found.append((*(found[parents[node]] if node else ()), token))
    return found


def accepted(
    tokens: list[int], parents: list[int], alive: list[bool], drawn: list[int], node: int = 0
) -> list[int]:
    """Return the nodes of the accepted path, walking down from `node`."""
    for child in range(1, len(tokens)):
        if parents[child] == node and alive[child] and tokens[child] == drawn[node]:
            return [node, *accepted(tokens, parents, alive, drawn, child)]
    return [node]
