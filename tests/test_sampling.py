from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_specstream.sampling import TokenChooser
from mlx_specstream.tree import DraftTree, root_only
from tests.reference.sampling import chi_square_p, distribution

LOGITS = mx.array([[0.0, 2.0, 1.0, -1.0], [3.0, 0.5, 0.0, 2.5], [0.0, 0.0, 0.1, 0.0]])


def tree_of(size: int) -> DraftTree:
    zero = mx.zeros((size,), dtype=mx.int32)
    return DraftTree(mx.arange(size, dtype=mx.int32), zero, zero, depth=size - 1)


def test_greedy_is_the_argmax_of_every_row() -> None:
    for sampler in (None, make_sampler(temp=0.0)):
        drawn, finite = TokenChooser(sampler)(LOGITS, tree_of(3))
        assert drawn.tolist() == [1, 0, 2]
        assert drawn.dtype == mx.int32
        assert finite.item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_samplers_get_float32_log_probabilities(dtype: mx.Dtype) -> None:
    seen = []

    def sampler(log_probs: mx.array) -> mx.array:
        seen.append(log_probs)
        return mx.argmax(log_probs, axis=-1)

    TokenChooser(sampler)(LOGITS.astype(dtype), tree_of(3))
    assert seen[0].dtype == mx.float32
    np.testing.assert_allclose(np.exp(np.array(seen[0])).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 1.0},
        {"temp": 0.7, "top_p": 0.8},
        {"temp": 1.3, "top_k": 2},
        {"temp": 1.0, "min_p": 0.3},
    ],
)
def test_rows_are_drawn_independently_from_their_own(options: dict[str, float]) -> None:
    """Pairs of the first two rows, thousands of times: the product of two distributions."""
    mx.random.seed(3)
    n = 4000
    drawn, _ = TokenChooser(make_sampler(**options))(mx.tile(LOGITS, (n, 1)), tree_of(3))
    rows = np.array(drawn).reshape(n, 3)[:, :2]
    first, second = (
        distribution(
            np.array(LOGITS[r]),
            options["temp"],
            options.get("top_p", 0),
            int(options.get("top_k", 0)),
        )
        for r in range(2)
    )
    if "min_p" in options:
        first, second = (np.where(p >= 0.3 * p.max(), p, 0) for p in (first, second))
        first, second = first / first.sum(), second / second.sum()
    expected = {(a, b): first[a] * second[b] for a in range(4) for b in range(4)}
    counts = {pair: 0 for pair in expected if expected[pair] > 0}
    for a, b in rows.tolist():
        counts[(a, b)] = counts.get((a, b), 0) + 1
    counts = {pair: count for pair, count in counts.items() if count}
    assert chi_square_p(counts, expected) > 1e-3


@pytest.mark.parametrize("place", range(40))
@pytest.mark.parametrize("sampler", [None, make_sampler(temp=1.0, top_p=0.9)])
def test_one_nan_is_seen_wherever_it_is(place: int, sampler: object) -> None:
    logits = np.random.default_rng(place).normal(size=(3, 40)).astype(np.float32)
    assert TokenChooser(sampler)(mx.array(logits), tree_of(3))[1].item()  # type: ignore[arg-type]
    logits[1, place] = np.nan
    assert not TokenChooser(sampler)(mx.array(logits), tree_of(3))[1].item()  # type: ignore[arg-type]


def test_forbidden_tokens_are_no_nan() -> None:
    logits = mx.array([[-mx.inf, 1.0, -mx.inf]])
    for sampler in (None, make_sampler(temp=1.0)):
        drawn, finite = TokenChooser(sampler)(logits, root_only(mx.array(0)))
        assert (drawn.item(), finite.item()) == (1, True)


def test_processors_get_the_text_and_the_drafts_above() -> None:
    seen: list[list[int]] = []

    def spy(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        assert logits.shape == (1, 4)
        return logits

    chooser = TokenChooser(processors=[spy], history=[7, 8, 2])
    tree = DraftTree(
        mx.array([2, 5, 6], dtype=mx.int32),
        mx.array([0, 0, 1], dtype=mx.int32),
        mx.arange(3, dtype=mx.int32),
        depth=2,
    )
    drawn, _ = chooser(LOGITS, tree)
    assert seen == [[7, 8, 2], [7, 8, 2, 5], [7, 8, 2, 5, 6]]
    assert drawn.tolist() == [1, 0, 2]


def test_processors_of_one_row_do_not_touch_the_next() -> None:
    """mlx-lm's processors write into the logits they are given."""
    processors = make_logits_processors(repetition_penalty=100.0)
    before = mx.array(LOGITS)
    chooser = TokenChooser(processors=processors, history=[1])
    tree = DraftTree(
        mx.array([1, 0, 0], dtype=mx.int32),
        mx.array([0, 0, 1], dtype=mx.int32),
        mx.arange(3, dtype=mx.int32),
        depth=2,
    )
    drawn, _ = chooser(LOGITS, tree)
    assert drawn.tolist() == [2, 3, 2]
    assert mx.array_equal(LOGITS, before)
