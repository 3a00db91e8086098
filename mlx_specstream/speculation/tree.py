"""Draft trees: which tokens a step verifies, and who descends from whom.

A tree lives on the device as three vectors. Node 0 is the root, a token the main stream has
already chosen; a node at depth d was proposed by stream d; parents come before their children.

    tokens   [ A   B   C   D ]          A ── B ── D
    parents  [ 0   0   0   1 ]            └─ C
    depths   [ 0   1   1   2 ]

    ancestors (row sees column)   A B C D
                              A [ 1 . . . ]
                              B [ 1 1 . . ]
                              C [ 1 . 1 . ]
                              D [ 1 1 . 1 ]

Trees are built level by level, so that candidates may depend on the token they follow
(`condition.py`); streams alone give marginals, for which every parent gets the same candidates.
Pure functions of arrays: nothing here knows a model, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from ..config import TreeSpec

# (level from 0, parent tokens (W,), the tokens before them (W,), places (W,) int32) -> candidates
# (W, k) int32 and their log-probabilities (W, k) float32, in any order. Candidates of one parent
# are distinct. Each parent was proposed below one of the parents of the call before: places say
# which, for those who keep a state per node (0 at level 0, whose one parent is the root).
Proposer = Callable[[int, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]

# Taken off a path's log-probability per level, so that a certain child (log-probability 0)
# never ranks before its parent: the best nodes always include their ancestors.
LEVEL_COST = 1e-4


@dataclass(frozen=True)
class DraftTree:
    """A tree of draft tokens on the device; `depth` is the deepest a node can lie.

    tokens, parents, depths: (T,) int32. alive: (T,) bool, or None when every node counts; a
    node that is not alive only fills up a fixed shape and is never accepted. scores: (T,)
    float32, what the nodes' paths were ranked by, if the tree was ranked. looked_up: (T,) bool,
    which nodes look-up was surer of than the drafter (`drafters/lookup`), None for none.
    num_leaves: so many of the last nodes have no children, whatever the tokens. above: the
    parents on the host, where they are the same in every tree of its kind: chains, products.
    """

    tokens: mx.array
    parents: mx.array
    depths: mx.array
    depth: int
    alive: mx.array | None = None
    scores: mx.array | None = None
    looked_up: mx.array | None = None
    num_leaves: int = 1
    above: tuple[int, ...] | None = None

    @property
    def num_nodes(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def is_chain(self) -> bool:
        """Tell whether every node is known to have the one before it as its parent."""
        return self.above == _chain_parents(self.num_nodes)

    @property
    def seen(self) -> mx.array:
        """Return who descends from whom, as `ancestors` has it; no work where that is fixed."""
        return ancestors(self.parents, self.depth) if self.above is None else _fixed(self.above)

    @property
    def arrays(self) -> list[mx.array]:
        """Return the vectors to evaluate together with a step."""
        scores = [] if self.scores is None else [self.scores]
        return [self.tokens, self.parents, self.depths, *scores]

    def expected(self) -> mx.array | None:
        """Return how many drafts should be accepted by their own probabilities, () float32.

        The sum of the probabilities that the path reaches a node; None without scores.
        """
        if self.scores is None or self.num_nodes < 2:
            return None
        return mx.sum(mx.exp(self.scores[1:].astype(mx.float32)))


def root_only(token: mx.array) -> DraftTree:
    """Return the tree of one node; `token` is a scalar or (1,) integer array."""
    zero = ints((0,))
    return DraftTree(token.reshape(1).astype(mx.int32), zero, zero, depth=0, above=(0,))


def chain(tokens: mx.array) -> DraftTree:
    """Return root and drafts in a row, (T,) integers, as a tree."""
    T = tokens.shape[0]
    above = _chain_parents(T)
    nodes = ints(tuple(range(T)))
    return DraftTree(tokens.astype(mx.int32), ints(above), nodes, depth=T - 1, above=above)


def ancestors(parents: mx.array, depth: int) -> mx.array:
    """Return the mask (T, T) bool in which node i sees itself and every node above it.

    `parents` is (T,) int32 with parents[0] = 0; `depth` bounds the depth of any node. A node
    sees what its parent sees, and itself.
    """
    itself = _itself(parents.shape[0])
    seen = itself
    for _ in range(depth):
        seen = itself | mx.take(seen, parents, axis=0)
    return seen


def build(
    root: mx.array, spec: TreeSpec, num_streams: int, propose: Proposer, before: mx.array
) -> DraftTree:
    """Grow a tree below `root` and keep the nodes the spec asks for; arguments as for `grow`.

    Of all levels together, a best-first tree keeps the best `spec.rows` nodes, root included.
    """
    tree, _ = grow(root, spec, num_streams, propose, before)
    return best_rows(tree, spec)


def best_rows(tree: DraftTree, spec: TreeSpec) -> DraftTree:
    """Return the best `spec.rows` nodes of a tree with scores, where the spec is best-first."""
    if spec.kind in ("auto", "best") and tree.num_nodes > spec.rows:
        # The root's score 0 is the highest of all, so it is always among the best.
        assert tree.scores is not None
        return select(tree, best_nodes(tree.scores, spec.rows))
    return tree


def grow(
    root: mx.array, spec: TreeSpec, num_streams: int, propose: Proposer, before: mx.array
) -> tuple[DraftTree, list[int]]:
    """Return a tree grown below `root` level by level, and how many nodes each level has.

    A path's score is the sum of its nodes' log-probabilities (the product of probabilities).
    Every level keeps its best `spec.level_widths` nodes. Shapes depend on the spec alone.

    Args:
        root: scalar or (1,) integer array, the token of node 0.
        propose: candidates for the next level, given the tokens of this one.
        before: scalar or (1,) integer array, the token that the root follows.
    """
    root = root.reshape(1).astype(mx.int32)
    widths = spec.level_widths(num_streams)
    tokens, scores = [root], [mx.array([0.0])]
    parents: list[tuple[int, ...] | mx.array] = [(0,)]  # on the host where they are fixed
    depths = [0]
    first, level_tokens, level_scores = 0, root, scores[0]
    level_before, places = before.reshape(1).astype(mx.int32), ints((0,))
    for level, width in enumerate(widths):
        ids, log_probs = propose(level, level_tokens, level_before, places)
        above, k = int(level_tokens.shape[0]), int(ids.shape[1])
        if spec.kind == "product" and k > spec.branching:
            k = spec.branching
            best = mx.argsort(-log_probs, axis=-1)[:, :k]
            ids, log_probs = (mx.take_along_axis(a, best, axis=-1) for a in (ids, log_probs))
        paths = (level_scores[:, None] + log_probs).reshape(-1)
        ids = ids.reshape(-1)
        width = min(width, above * k)
        place: mx.array | None = None  # of each kept node's parent in the level above
        if width < above * k:
            best = _best(paths, width)
            paths, ids = mx.take(paths, best), mx.take(ids, best)
            place = (best // k).view(mx.int32) if above > 1 else None
        if place is None:
            fixed = tuple(i // k if above > 1 else 0 for i in range(width))
            parents.append(tuple(first + i for i in fixed))
            place = ints(fixed)
        else:
            parents.append(place + first if first else place)
        first = sum(int(t.shape[0]) for t in tokens)
        tokens.append(ids.astype(mx.int32))
        scores.append(paths)
        depths += [level + 1] * width
        one = above == 1
        level_before = (
            mx.broadcast_to(level_tokens, (width,)) if one else mx.take(level_tokens, place)
        )
        level_tokens, level_scores, places = tokens[-1], paths, place
    fixed_parents = tuple(i for part in parents if isinstance(part, tuple) for i in part)
    is_fixed = len(fixed_parents) == len(depths)
    tree = DraftTree(
        mx.concatenate(tokens),
        ints(fixed_parents)
        if is_fixed
        else mx.concatenate([ints(p) if isinstance(p, tuple) else p for p in parents]),
        ints(tuple(depths)),
        depth=len(widths),
        scores=mx.concatenate(scores) - _costs(tuple(depths)),
        num_leaves=int(level_tokens.shape[0]),
        above=fixed_parents if is_fixed else None,
    )
    return tree, [int(level.shape[0]) for level in tokens]


def select(tree: DraftTree, kept: mx.array) -> DraftTree:
    """Return the tree of the nodes `kept` alone.

    `kept` is (m,) int32, ascending, holds node 0 and with every node its parent.
    """
    nothing = ints((0,) * tree.num_nodes)
    place = nothing.at[kept].add(ints(tuple(range(kept.shape[0]))))
    return DraftTree(
        mx.take(tree.tokens, kept),
        mx.take(place, mx.take(tree.parents, kept)),
        mx.take(tree.depths, kept),
        depth=min(tree.depth, kept.shape[0] - 1),
        alive=None if tree.alive is None else mx.take(tree.alive, kept),
        scores=None if tree.scores is None else mx.take(tree.scores, kept),
        looked_up=None if tree.looked_up is None else mx.take(tree.looked_up, kept),
    )


def end_chances(tree: DraftTree) -> mx.array:
    """Return the probability that the accepted path ends at each node, (T,) float32.

    A path ends at a node if it gets there and none of the node's children is right: with p the
    probability of getting somewhere, p(node) − Σ p(children). `tree` has scores.
    """
    assert tree.scores is not None
    reached = mx.exp(tree.scores)
    if tree.alive is not None:
        reached = mx.where(tree.alive, reached, 0)
    return reached - mx.zeros_like(reached).at[tree.parents[1:]].add(reached[1:])


def likely_ends(tree: DraftTree, count: int) -> mx.array:
    """Return the `count` nodes at which the accepted path likeliest ends, ascending, int32."""
    return best_nodes(end_chances(tree), count)


def best_nodes(scores: mx.array, count: int) -> mx.array:
    """Return the indices of the `count` highest of `scores` (T,), ascending, (count,) int32."""
    return mx.sort(_best(scores, count)).view(mx.int32)


def _best(scores: mx.array, count: int) -> mx.array:
    if count == 1:
        return mx.argmax(scores, keepdims=True)
    return mx.argsort(-scores)[:count]


@cache
def ints(values: Iterable[int]) -> mx.array:
    """Return a constant (n,) int32 for a tuple, the same array every time: a step need not make it.

    Not to be written into.
    """
    return mx.array(list(values), dtype=mx.int32)


@cache
def _costs(depths: tuple[int, ...]) -> mx.array:
    return mx.array([depth * LEVEL_COST for depth in depths])


@cache
def _itself(nodes: int) -> mx.array:
    return mx.array([[i == j for j in range(nodes)] for i in range(nodes)])


@cache
def _fixed(above: tuple[int, ...]) -> mx.array:
    """Return the ancestors of a tree whose parents are known."""
    rows: list[list[bool]] = []
    for node, parent in enumerate(above):
        rows.append(rows[parent].copy() if node else [False] * len(above))
        rows[node][node] = True
    return mx.array(rows)


@cache
def _chain_parents(nodes: int) -> tuple[int, ...]:
    return tuple(max(node - 1, 0) for node in range(nodes))
