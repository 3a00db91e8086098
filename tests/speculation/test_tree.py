from __future__ import annotations

from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream.config import TreeSpec
from mlx_specstream.speculation.tree import (
    DraftTree,
    Proposer,
    ancestors,
    best_nodes,
    build,
    chain,
    likely_ends,
    root_only,
    select,
)
from tests.reference import tree as reference
from tests.support.engine import examples

VOCAB = 9


class Table:
    """Candidates per level and parent token; the same for every parent if `marginal`."""

    def __init__(self, seed: int, depth: int, width: int, sharpness: float, marginal: bool) -> None:
        random = np.random.default_rng(seed)
        parents = 1 if marginal else VOCAB
        self.ids = np.argsort(random.random((depth, parents, VOCAB)), axis=-1)[..., :width]
        logits = sharpness * random.normal(size=(depth, parents, width))
        # Coarse, so that ties occur; with one candidate it is certain.
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        self.log_probs = -np.sort(np.round(-log_probs * 4) / 4, axis=-1)
        if marginal:
            self.ids = np.repeat(self.ids, VOCAB, axis=1)
            self.log_probs = np.repeat(self.log_probs, VOCAB, axis=1)

    def plain(self, level: int, token: int) -> list[tuple[int, float]]:
        pairs = zip(self.ids[level, token], self.log_probs[level, token], strict=True)
        return [(int(i), float(p)) for i, p in pairs]

    @property
    def proposer(self) -> Proposer:
        ids = mx.array(self.ids.astype(np.int32))
        log_probs = mx.array(self.log_probs.astype(np.float32))
        return lambda level, parents, *_: (ids[level][parents], log_probs[level][parents])


tables = st.builds(
    Table,
    seed=st.integers(0, 10**6),
    depth=st.just(5),
    width=st.integers(1, VOCAB),
    sharpness=st.sampled_from([0.3, 2.0, 30.0]),  # 30: certain candidates, log-probability 0
    marginal=st.booleans(),
)


def checked(spec: TreeSpec, gamma: int, table: Table) -> tuple[list[tuple[int, ...]], list[float]]:
    """Build a tree, check what every tree must be, return its paths and their scores."""
    tree = build(mx.array([4]), spec, gamma, table.proposer, mx.array(0))
    tokens, parents, depths = (a.tolist() for a in (tree.tokens, tree.parents, tree.depths))
    assert tree.tokens.dtype == tree.parents.dtype == tree.depths.dtype == mx.int32
    assert (tokens[0], parents[0], depths[0]) == (4, 0, 0)
    for node in range(1, tree.num_nodes):
        assert parents[node] < node
        assert depths[node] == depths[parents[node]] + 1 <= tree.depth
    paths = reference.paths(tokens, parents)
    assert len(set(paths)) == len(paths), "children of one node must be distinct"
    scores = []
    for path in paths:
        steps = (dict(table.plain(level, path[level])) for level in range(len(path) - 1))
        scores.append(sum(step[token] for step, token in zip(steps, path[1:], strict=True)))
    return paths, scores


@examples(150)
@given(tables, st.integers(1, 24), st.integers(1, 9), st.integers(0, 5), st.integers(1, 5))
def test_best_tree_holds_the_best_nodes(
    table: Table, rows: int, branching: int, depth: int, gamma: int
) -> None:
    spec = TreeSpec(kind="best", rows=rows, branching=branching, depth=depth)
    paths, scores = checked(spec, gamma, table)
    deep = min(depth or gamma, gamma)
    wanted = reference.best_first(4, rows, deep, VOCAB, table.plain)
    assert len(paths) == len(wanted) <= spec.num_nodes(gamma)
    # Nodes of equal score may stand in for one another, so compare scores, and every node whose
    # score is not that of the worst. The level cost is far below the table's resolution of 1/4.
    np.testing.assert_allclose(sorted(scores), sorted(n.score for n in wanted), atol=1e-9)
    worst = min(scores)
    assert {p for p, s in zip(paths, scores, strict=True) if s > worst + 1e-6} == {
        n.path for n in wanted if n.score > worst + 1e-6
    }


@examples(60)
@given(tables, st.integers(1, 3), st.integers(0, 5), st.integers(1, 4))
def test_product_tree_is_full(table: Table, branching: int, depth: int, gamma: int) -> None:
    paths, _ = checked(TreeSpec(kind="product", branching=branching, depth=depth), gamma, table)
    deep = min(depth or gamma, gamma)
    wanted = reference.product(4, deep, branching, table.plain)
    assert Counter(paths) == Counter(node.path for node in wanted)


@examples(60)
@given(tables, st.integers(1, 9), st.integers(0, 5), st.integers(1, 5))
def test_chain_takes_the_best_of_every_level(
    table: Table, branching: int, depth: int, gamma: int
) -> None:
    paths, _ = checked(TreeSpec(kind="chain", branching=branching, depth=depth), gamma, table)
    deep = min(depth or gamma, gamma)
    path = (4,)
    for level in range(deep):
        path = (*path, table.plain(level, path[-1])[0][0])
    assert paths == [path[: n + 1] for n in range(deep + 1)]


@examples(60)
@given(tables, st.sampled_from(["chain", "7", "16", "2^3", "3^2"]), st.integers(1, 4))
def test_a_proposer_is_told_below_which_node_each_parent_was_proposed(
    table: Table, shape: str, gamma: int
) -> None:
    """So that one that keeps a state per node knows every parent's whole path."""
    paths: list[list[tuple[int, ...]]] = []

    def propose(
        level: int, parents: mx.array, before: mx.array, places: mx.array
    ) -> tuple[mx.array, mx.array]:
        above = paths[level - 1] if level else [(0,)]
        own = [above[place] for place in places.tolist()]  # type: ignore[union-attr]
        assert [path[-1] for path in own] == before.tolist()
        paths.append([(*path, t) for path, t in zip(own, parents.tolist(), strict=True)])  # type: ignore[arg-type]
        return table.proposer(level, parents, before, places)

    tree = build(mx.array([4]), TreeSpec.parse(shape), gamma, propose, mx.array(0))
    asked = {path[1:] for level in paths for path in level}
    inner = set(tree.parents.tolist()[1:])  # type: ignore[index, arg-type]
    built = reference.paths(tree.tokens.tolist(), tree.parents.tolist())  # type: ignore[arg-type]
    assert {built[node] for node in inner} <= asked


@pytest.mark.parametrize("log_prob", [0.0, -1e3, -1e6, -np.inf, np.nan])
@pytest.mark.parametrize("rows", [2, 5, 16])
def test_parents_come_first_whatever_the_scores(log_prob: float, rows: int) -> None:
    """Certain, hopeless and NaN candidates, all of one score: a tree must still be a tree."""

    def propose(level: int, parents: mx.array, *_: mx.array) -> tuple[mx.array, mx.array]:
        W = parents.shape[0]
        ids = mx.broadcast_to(mx.arange(8, dtype=mx.int32), (W, 8))
        return ids, mx.full((W, 8), log_prob)

    tree = build(mx.array(1), TreeSpec(kind="best", rows=rows), 4, propose, mx.array(0))
    tokens, parents, depths = (a.tolist() for a in (tree.tokens, tree.parents, tree.depths))
    assert len(tokens) == rows
    assert depths[0] == 0
    for node in range(1, rows):
        assert parents[node] < node
        assert depths[node] == depths[parents[node]] + 1
    assert len(set(reference.paths(tokens, parents))) == rows


@st.composite
def parent_lists(draw: st.DrawFn) -> list[int]:
    size = draw(st.integers(1, 20))
    return [0] + [draw(st.integers(0, node - 1)) for node in range(1, size)]


def depths_of(parents: list[int]) -> list[int]:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


@examples(100)
@given(parent_lists(), st.integers(0, 3))
def test_ancestors_against_a_walk(parents: list[int], spare: int) -> None:
    depth = max(depths_of(parents)) + spare
    mask = ancestors(mx.array(parents, dtype=mx.int32), depth)
    assert mask.dtype == mx.bool_
    assert mask.tolist() == reference.ancestors(parents)


@examples(100)
@given(parent_lists(), st.data())
def test_select_keeps_paths(parents: list[int], data: st.DataObject) -> None:
    tokens = [7 * node % 5 for node in range(len(parents))]
    asked = data.draw(st.sets(st.integers(0, len(parents) - 1)))
    mask = reference.ancestors(parents)
    kept = sorted({0} | {a for node in asked for a, above in enumerate(mask[node]) if above})
    depths = depths_of(parents)
    alive = [node % 3 != 1 for node in range(len(parents))]
    tree = DraftTree(
        mx.array(tokens, dtype=mx.int32),
        mx.array(parents, dtype=mx.int32),
        mx.array(depths, dtype=mx.int32),
        max(depths),
        mx.array(alive),
    )
    small = select(tree, mx.array(kept, dtype=mx.int32))
    before, after = (reference.paths(t.tokens.tolist(), t.parents.tolist()) for t in (tree, small))
    assert after == [before[node] for node in kept]
    assert small.depths.tolist() == [depths[node] for node in kept]
    assert small.alive is not None
    assert small.alive.tolist() == [alive[node] for node in kept]


def test_best_nodes_are_ascending() -> None:
    assert best_nodes(mx.array([0.0, -3, -1, -2, -1]), 3).tolist() == [0, 2, 4]


def test_root_only() -> None:
    for token in (mx.array(5), mx.array([5]), mx.array([5], dtype=mx.uint32)):
        tree = root_only(token)
        assert [a.tolist() for a in tree.arrays] == [[5], [0], [0]]
        assert tree.depth == 0


def test_building_waits_for_nothing() -> None:
    """Tokens and scores may still be unknown: shapes come from spec and proposer alone."""
    asked = []

    def propose(level: int, parents: mx.array, *_: mx.array) -> tuple[mx.array, mx.array]:
        asked.append((level, parents.shape))
        W = parents.shape[0]
        return mx.broadcast_to(mx.arange(3), (W, 3)), mx.zeros((W, 3))

    tree = build(mx.array([0]), TreeSpec(kind="best", rows=6, branching=2), 3, propose, mx.array(0))
    assert asked == [(0, (1,)), (1, (3,)), (2, (5,))]
    assert tree.num_nodes == 6


def test_likely_ends_are_where_probability_stays() -> None:
    """Root .1 (children .6 + .3), its first child .6 − .5, its second .3, the grandchild .5."""
    scores = mx.log(mx.array([1.0, 0.6, 0.3, 0.5]))
    parents = mx.array([0, 0, 0, 1], dtype=mx.int32)
    depths = mx.array([0, 1, 1, 2], dtype=mx.int32)
    tree = DraftTree(mx.arange(4, dtype=mx.int32), parents, depths, 2, scores=scores)
    assert likely_ends(tree, 1).tolist() == [3]
    assert likely_ends(tree, 2).tolist() == [2, 3]
    dead = replace(tree, alive=mx.array([True, True, True, False]))
    assert likely_ends(dead, 1).tolist() == [1]


def test_a_chain_is_a_tree() -> None:
    tree = chain(mx.array([7, 8, 9]))
    assert [a.tolist() for a in (tree.tokens, tree.parents, tree.depths)] == [
        [7, 8, 9],
        [0, 0, 1],
        [0, 1, 2],
    ]
    assert (tree.depth, tree.num_nodes) == (2, 3)
    assert chain(mx.array([7])).parents.tolist() == root_only(mx.array(7)).parents.tolist() == [0]
