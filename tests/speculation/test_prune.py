from __future__ import annotations

from dataclasses import replace
from typing import cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from mlx_specstream.config import PruneSpec, TreeSpec
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.speculation.prune import Pruner, prune
from mlx_specstream.speculation.tree import DraftTree, ancestors, build
from tests.reference import tree as reference
from tests.support.engine import examples, random_tensors, small_model, stream_config


@st.composite
def scored_trees(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    """Parents, and log-probabilities given the parent: coarse, certain or hopeless ones too."""
    size = draw(st.integers(1, 20))
    parents = [0] + [draw(st.integers(max(0, node - 4), node - 1)) for node in range(1, size)]
    value = st.sampled_from([0.0, -0.5, -1.0, -2.0, -3.0, -50.0, -5000.0, -np.inf])
    return parents, [0.0] + [draw(value) for _ in range(1, size)]


def draft_of(parents: list[int]) -> DraftTree:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return DraftTree(
        mx.arange(10, 10 + len(parents), dtype=mx.int32),  # tokens name the old nodes
        mx.array(parents, dtype=mx.int32),
        mx.array(depths, dtype=mx.int32),
        max(depths),
    )


@examples(200)
@given(scored_trees(), st.integers(1, 22), st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_prune_against_plain_sums(
    scored: tuple[list[int], list[float]], keep: int, threshold: float
) -> None:
    parents, log_probs = scored
    tree, kept = prune(draft_of(parents), mx.array(log_probs), PruneSpec(keep, threshold))
    nodes = kept.tolist()
    assert len(nodes) == tree.num_nodes == min(keep, len(parents))
    assert nodes == sorted(set(nodes))
    assert nodes[0] == 0
    above = reference.ancestors(parents)
    alive = [True] * len(nodes) if tree.alive is None else tree.alive.tolist()

    # What is left is still a tree: the same paths, without gaps.
    assert tree.tokens.tolist() == [10 + node for node in nodes]
    for place, node in enumerate(nodes):
        assert {a for a, sees in enumerate(above[node]) if sees} <= set(nodes)
        if place:
            assert nodes[tree.parents.tolist()[place]] == parents[node]
    assert ancestors(tree.parents, tree.depth).tolist() == reference.ancestors(
        tree.parents.tolist()
    )

    # The threshold takes a child and all below it, and nothing else.
    low = (
        [node > 0 and log_probs[node] < np.log(threshold) for node in range(len(parents))]
        if (threshold)
        else [False] * len(parents)
    )
    doomed = [any(low[a] for a in range(len(parents)) if above[n][a]) for n in range(len(parents))]
    assert alive == [not doomed[node] for node in nodes]

    # Kept are the best by the product of probabilities, among those that live.
    score = [
        sum(log_probs[a] for a in range(len(parents)) if above[n][a]) for n in range(len(parents))
    ]
    living = [n for n in range(len(parents)) if not doomed[n]]
    wanted = sorted((score[n] for n in living), reverse=True)[: min(keep, len(living))]
    found = sorted((score[n] for n in nodes if not doomed[n]), reverse=True)
    event(f"{len(nodes)} of {len(parents)} kept, {len(living)} alive")
    clear = [s for s in wanted if s > -900]  # hopeless ones are all alike
    np.testing.assert_allclose(found[: len(clear)], clear, atol=1e-2)
    assert len(found) == len(wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_the_early_exit_given_the_parent(tied: bool) -> None:
    model = small_model(layers=2, vocab=30, tie_word_embeddings=tied)
    backbone = Backbone(model)
    tensors = random_tensors(backbone, stream_config(num_msa_layers=1))
    a, b = tensors["pruner.lora_a"], tensors["pruner.lora_b"]
    tree = draft_of([0, 0, 0, 1, 1, 3])
    main = mx.random.normal((1, 6, 32), key=mx.random.key(2))
    found = np.array(Pruner(a, b).child_log_probs(backbone, tree, main))
    x, down, up = np.array(main[0]), np.array(a), np.array(b)
    exit_state = backbone.norm(mx.array(x + x @ down @ up)[None])
    logits = np.array(backbone.head(exit_state)[0])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = [0.0] + [log_probs[[0, 0, 0, 1, 1, 3][n], 10 + n] for n in range(1, 6)]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_pruner_of_zeros_is_the_plain_early_exit() -> None:
    backbone = Backbone(small_model(layers=2, vocab=30))
    tree = draft_of([0, 0, 1])
    main = mx.random.normal((1, 3, 32), key=mx.random.key(2))
    zero = Pruner(mx.zeros((32, 2)), mx.zeros((2, 32)))
    found = np.exp(np.array(zero.child_log_probs(backbone, tree, main)))
    logits = np.array(backbone.logits(main))
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, [1, share[0, 11], share[1, 12]], atol=1e-5)


def test_a_nodes_probability_does_not_depend_on_the_tree_around_it() -> None:
    """Nor on how often a token stands in it: a threshold means the same everywhere."""
    backbone = Backbone(small_model(layers=2, vocab=30))
    tensors = random_tensors(backbone, stream_config(num_msa_layers=1))
    pruner = Pruner(tensors["pruner.lora_a"], tensors["pruner.lora_b"])
    main = mx.random.normal((1, 6, 32), key=mx.random.key(2))
    found = []
    for others in ([], [12, 13], [11, 11, 11, 11]):
        tokens = mx.array([10, 11, *others], dtype=mx.int32)
        n = tokens.shape[0]
        parents = mx.zeros((n,), dtype=mx.int32)
        tree = DraftTree(tokens, parents, mx.minimum(mx.arange(n), 1), 1)
        found.append(pruner.child_log_probs(backbone, tree, main[:, :n])[1].item())
    np.testing.assert_allclose(found, found[0], atol=1e-5)


@pytest.mark.parametrize(("words", "rows"), [("3^3", 13), ("chain3", 3), ("16", 15), ("1", 1)])
def test_leaves_do_not_go_through_the_head(words: str, rows: int) -> None:
    backbone = Backbone(small_model(layers=2, vocab=30))
    tensors = random_tensors(backbone, stream_config(num_msa_layers=1))
    pruner = Pruner(tensors["pruner.lora_a"], tensors["pruner.lora_b"])

    def propose(level: int, above: mx.array, *_: mx.array) -> tuple[mx.array, mx.array]:
        ids = mx.broadcast_to(mx.arange(8) + 3 * level, (above.shape[0], 8))
        return ids, mx.log(mx.softmax(mx.random.normal(ids.shape, key=mx.random.key(level))))

    tree = build(mx.array([1]), TreeSpec.parse(words), 3, propose, mx.array([0]))
    main = mx.random.normal((1, tree.num_nodes, 32), key=mx.random.key(2))
    seen: list[int] = []

    class Counted:
        norm = staticmethod(backbone.norm)

        @staticmethod
        def head(hidden: mx.array) -> mx.array:
            seen.append(hidden.shape[1])
            return backbone.head(hidden)

    found = np.array(pruner.child_log_probs(cast(Backbone, Counted), tree, main))
    assert seen == [rows]
    every = np.array(pruner.child_log_probs(backbone, replace(tree, num_leaves=0), main))
    np.testing.assert_allclose(found, every, atol=1e-5)


def test_nothing_to_prune() -> None:
    tree, kept = prune(draft_of([0]), mx.array([0.0]), PruneSpec(3, 0.9))
    assert kept.tolist() == [0]
    assert tree.alive is not None
    assert tree.alive.tolist() == [True]
