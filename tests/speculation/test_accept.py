from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from mlx_specstream.config import TypicalSpec
from mlx_specstream.errors import OptionError
from mlx_specstream.speculation.accept import accept, typical_choice
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.tree import DraftTree, ancestors, chain, root_only
from tests.reference import tree as reference
from tests.support.engine import examples


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[bool]]:
    """Tokens, parents, alive: few tokens, so the same ones stand at many places."""
    tokens, parents = [draw(st.integers(0, 3))], [0]
    for _ in range(draw(st.integers(0, 18))):
        parent = draw(st.integers(0, len(tokens) - 1))
        taken = {t for t, p in zip(tokens[1:], parents[1:], strict=True) if p == parent}
        free = sorted(set(range(4)) - taken)
        if free:
            parents.append(parent)
            tokens.append(draw(st.sampled_from(free)))
    dead = draw(st.sets(st.integers(1, 18), max_size=4))
    return tokens, parents, [node not in dead for node in range(len(tokens))]


@examples(300)
@given(
    trees(), st.lists(st.integers(0, 3), min_size=19, max_size=19), st.booleans(), st.integers(0, 2)
)
def test_accept_against_a_walk(
    tree: tuple[list[int], list[int], list[bool]], drawn: list[int], with_dead: bool, spare: int
) -> None:
    tokens, parents, alive = tree
    if not with_dead:
        alive = [True] * len(tokens)
    drawn = drawn[: len(tokens)]
    depths = [len(path) - 1 for path in reference.paths(tokens, parents)]
    draft = DraftTree(
        mx.array(tokens, dtype=mx.int32),
        mx.array(parents, dtype=mx.int32),
        mx.array(depths, dtype=mx.int32),
        depth=max(depths) + spare,
        alive=mx.array(alive) if with_dead else None,
    )
    path = accept(draft, ancestors(draft.parents, draft.depth), mx.array(drawn, dtype=mx.uint32))
    wanted = reference.accepted(tokens, parents, alive, drawn)
    event(f"accepted {len(wanted) - 1}")
    n = len(wanted)
    assert path.length.item() == n - 1
    assert path.node.item() == wanted[-1]
    assert path.nodes.tolist()[:n] == wanted
    assert path.nodes.shape == path.tokens.shape
    assert path.nodes.shape[0] == min(draft.depth + 1, len(tokens))
    assert path.tokens.tolist()[:n] == [drawn[node] for node in wanted]
    assert path.next_root.item() == drawn[wanted[-1]]
    assert min(path.nodes.tolist()) >= 0
    assert max(path.nodes.tolist()) < len(tokens)


def test_long_paths_are_walked_to_the_end() -> None:
    n = 33
    tree = chain(mx.arange(n))
    seen = ancestors(tree.parents, tree.depth)
    path = accept(tree, seen, mx.arange(1, n + 1))
    assert path.tokens.tolist() == list(range(1, n + 1))
    right = np.arange(1, n + 1)
    right[4] = 0
    path = accept(tree, seen, mx.array(right))
    assert path.length.item() == 4
    assert path.next_root.item() == 0


def test_a_dead_child_is_not_accepted_and_hides_its_own() -> None:
    tree = DraftTree(
        mx.array([1, 2, 3], dtype=mx.int32),
        mx.array([0, 0, 1], dtype=mx.int32),
        mx.array([0, 1, 2], dtype=mx.int32),
        depth=2,
        alive=mx.array([True, False, True]),
    )
    path = accept(tree, ancestors(tree.parents, 2), mx.array([2, 3, 4]))
    assert path.length.item() == 0
    assert path.next_root.item() == 2


def test_root_alone() -> None:
    path = accept(root_only(mx.array(9)), mx.ones((1, 1), dtype=mx.bool_), mx.array([3]))
    assert path.tokens.tolist() == [3]
    assert path.length.item() == 0


@examples(200)
@given(
    st.lists(st.integers(-6, 6), min_size=4, max_size=4),
    st.sets(st.integers(0, 3)),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
)
def test_typical_choice_against_its_definition(
    logits: list[int], children: set[int], epsilon: float, delta: float
) -> None:
    row = np.array(logits, dtype=np.float64) / 2
    p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    threshold = min(epsilon, delta * np.exp((p * np.log(p)).sum()))
    tokens = [3, 0, 2, 1]
    typical = [tokens[child] for child in children if p[tokens[child]] > threshold]
    drawn = 1
    found = typical_choice(
        TypicalSpec(epsilon, delta),
        mx.array(row[None]),
        mx.array(tokens),
        mx.array([child in children for child in range(4)]),
        mx.array([drawn]),
    ).item()
    event(f"{len(typical)} typical")
    if typical:
        assert found in typical
        assert p[found] >= max(p[token] for token in typical) - 1e-6
    else:
        assert found == drawn


def test_typical_acceptance_takes_what_was_not_drawn() -> None:
    """Root 1's second child is likely but not likeliest; below it the draft is improbable."""
    logits = mx.log(mx.array([[0.6, 0.0, 0.3, 0.1], [0.25] * 4, [0.9, 0.05, 0.04, 0.01]]))
    tree = DraftTree(
        *(mx.array(values, dtype=mx.int32) for values in ([1, 2, 3], [0, 0, 1], [0, 1, 2])), depth=2
    )
    logits = mx.take(logits, mx.array([0, 2, 1]), axis=0)
    assert TokenSampler()(logits, tree)[0].tolist()[0] == 0
    drawn, finite = TokenSampler(history=[1], typical=TypicalSpec())(logits, tree)
    assert drawn.tolist() == [2, 0, -1]
    assert mx.all(finite).item()
    path = accept(tree, ancestors(tree.parents, 2), drawn)
    assert path.tokens.tolist()[:2] == [2, 0]
    strict = TokenSampler(history=[1], typical=TypicalSpec(epsilon=0.9, delta=1.0))
    assert strict(logits, tree)[0].tolist() == [0, -1, -1]


@pytest.mark.parametrize("fields", [{"epsilon": 0.0}, {"epsilon": 1.5}, {"delta": -1.0}])
def test_typical_values_are_checked(fields: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="must be above 0 and at most 1"):
        TypicalSpec(**fields)
