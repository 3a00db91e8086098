from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream.model.backbone import Backbone
from mlx_specstream.speculation.condition import (
    GROUP,
    NUM_GROUPS,
    Candidates,
    ConditionedProposer,
    Conditioner,
    MarginalProposer,
    top_candidates,
)
from tests.support.engine import examples, random_tensors, small_model, stream_config


@examples(60)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 12, 63, 64, 65, 1000, 2 * GROUP * NUM_GROUPS, 16385, 20001]),
    st.sampled_from([1, 2, 8, 32, 64]),
    st.integers(0, 99),
    st.booleans(),
)
def test_top_candidates_against_a_sort(
    rows: int, vocab: int, count: int, seed: int, together: bool
) -> None:
    logits = np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32)
    if together:  # the best ones side by side, in one group of ids
        logits[:, : min(vocab, 40)] += 9
    hidden = mx.zeros((rows, 4))
    found = top_candidates(mx.array(logits), hidden, count)
    assert found.ids.dtype == mx.int32
    order = np.argsort(-logits, axis=-1)[:, : min(count, vocab)]
    np.testing.assert_array_equal(np.array(found.ids), order)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    wanted = np.take_along_axis(exact, order, axis=-1)
    if vocab <= 2 * GROUP * NUM_GROUPS:
        np.testing.assert_allclose(np.array(found.log_probs), wanted, atol=1e-4)
    else:  # relative to the best groups: too high by one number per row, never above certainty
        gap = np.array(found.log_probs) - wanted
        assert (gap > -1e-4).all()
        np.testing.assert_allclose(gap, np.repeat(gap[:, :1], gap.shape[1], axis=1), atol=1e-4)
        assert (np.exp(np.array(found.log_probs)).sum(-1) <= 1 + 1e-4).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits(dtype: mx.Dtype) -> None:
    logits = mx.array([[1.0, 5.0, 3.0, 4.0]], dtype=dtype)
    found = top_candidates(logits, mx.zeros((1, 2)), 3)
    assert found.ids.tolist() == [[1, 3, 2]]
    assert found.log_probs.dtype == mx.float32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_conditioned_candidates_against_the_formula(seed: int, num_tokens: int, tied: bool) -> None:
    """Δ(p, s) = W2·silu(W1·[ê; ŝ; ĝ]) + B·A·ê; the candidates' own mass stays what it was."""
    model = small_model(layers=2, vocab=30, seed=seed, tie_word_embeddings=tied)
    backbone = Backbone(model)
    config = stream_config(num_msa_layers=1, conditioner_tokens=num_tokens)
    tensors = random_tensors(backbone, config, seed)
    parts = [tensors[f"conditioner.{n}"] for n in ("mlp_in", "mlp_out", "lora_a", "lora_b")]
    random = np.random.default_rng(seed)
    hidden = mx.array(random.normal(size=(3, 32)).astype(np.float32))
    logits = backbone.head(hidden[None])[0]
    marginal = top_candidates(logits, hidden, 7)
    proposer = ConditionedProposer(Conditioner(*parts), backbone, marginal)
    w1, w2, a, b = (np.array(part).astype(np.float64) for part in parts)
    embedding = np.array(model.model.embed_tokens.weight).astype(np.float64)
    head = embedding if tied else np.array(model.lm_head.weight).astype(np.float64)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-6)

    levels = [([8], [11], [0]), ([5, 0, 29, 5], [8] * 4, [0] * 4)]
    levels.append(([3, 5, 5, 7], [29, 5, 0, 5], [2, 3, 1, 0]))
    levels += levels  # a tree may be grown twice
    for index, (parents, before, places) in enumerate(levels):
        level = index % 3
        ids, log_probs = proposer(level, *(mx.array(a) for a in (parents, before, places)))
        base = dict(
            zip(marginal.ids[level].tolist(), marginal.log_probs[level].tolist(), strict=True)
        )
        for row, parent in enumerate(parents):
            e, s = unit(embedding[parent]), unit(np.array(hidden[level]).astype(np.float64))
            known = [e, s, unit(embedding[before[row]])][: 1 + num_tokens]
            z = w1 @ np.concatenate(known)
            delta = w2 @ (z / (1 + np.exp(-z))) + b.T @ (a.T @ e)
            scores = {c: p + head[c] @ delta for c, p in base.items()}
            total = np.log(sum(np.exp(v) for v in scores.values()))
            mass = np.log(sum(np.exp(v) for v in base.values()))
            found = dict(zip(ids[row].tolist(), log_probs[row].tolist(), strict=True))
            assert set(found) == set(base)
            for c, value in found.items():
                assert abs(value - (scores[c] - total + mass)) < 2e-3
        if level == 2:  # rows 1 and 2 have the same parent, and another token before it
            assert mx.array_equal(log_probs[1], log_probs[2]) == (num_tokens == 1)


def test_best_candidates_of_parents_with_streams_of_their_own() -> None:
    model = small_model(layers=2, vocab=30)
    backbone = Backbone(model)
    tensors = random_tensors(backbone, stream_config(num_msa_layers=1, conditioner_tokens=2))
    parts = [tensors[f"conditioner.{n}"] for n in ("mlp_in", "mlp_out", "lora_a", "lora_b")]
    hidden = mx.random.normal((4, 32), key=mx.random.key(1))
    marginal = top_candidates(backbone.head(hidden[None])[0], hidden, 8)
    proposer = ConditionedProposer(Conditioner(*parts), backbone, marginal)
    rows, first, before = [2, 0, 1, 2, 0], [7, 7, 11, 29, 1], [2, 28, 2, 5, 5]
    second = [4, 9, 9, 9, 21]
    wanted = []
    for row, token, parent, earlier in zip(rows, second, first, before, strict=True):
        proposer(0, mx.array([parent]), mx.array([earlier]), mx.array([0]))
        ids, log_probs = proposer(row + 1, mx.array([token]), mx.array([parent]), mx.array([0]))
        wanted.append(ids[0, mx.argmax(log_probs[0])].item())
    proposer = ConditionedProposer(Conditioner(*parts), backbone, marginal)
    proposer.best(0, mx.array(rows), mx.array(first), mx.array(before))
    best = proposer.best(1, mx.array(rows) + 1, mx.array(second), mx.array(first))
    assert best.tolist() == wanted
    assert len(set(wanted)) > 2
    assert wanted != [marginal.ids[row + 1, 0].item() for row in rows]


def test_marginal_candidates_do_not_know_their_parent() -> None:
    ids, log_probs = mx.array([[4, 2], [9, 1]]), mx.array([[-0.1, -3.0], [-0.5, -1.0]])
    proposer = MarginalProposer(Candidates(ids, log_probs, mx.zeros((2, 3))))
    parents = mx.array([7, 8, 9])
    found_ids, found = proposer(1, parents, parents, parents)
    assert found_ids.tolist() == [[9, 1]] * 3
    assert found.tolist() == [[-0.5, -1.0]] * 3
