from __future__ import annotations

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.tree import DraftTree, root_only
from tests.reference import tree as reference
from tests.reference.sampling import chi_square_p, distribution
from tests.speculation.test_accept import trees
from tests.support.engine import examples

LOGITS = mx.array([[0.0, 2.0, 1.0, -1.0], [3.0, 0.5, 0.0, 2.5], [0.0, 0.0, 0.1, 0.0]])


def tree_of(size: int) -> DraftTree:
    zero = mx.zeros((size,), dtype=mx.int32)
    return DraftTree(mx.arange(size, dtype=mx.int32), zero, zero, depth=size - 1)


def tree_from(tokens: list[int], parents: list[int], alive: list[bool] | None = None) -> DraftTree:
    depths: list[int] = []
    for node, parent in enumerate(parents):
        depths.append(depths[parent] + 1 if node else 0)
    return DraftTree(
        *(mx.array(values, dtype=mx.int32) for values in (tokens, parents, depths)),
        depth=max(depths),
        alive=None if alive is None else mx.array(alive),
    )


def test_greedy_is_the_argmax_of_every_row() -> None:
    for sampler in (None, make_sampler(temp=0.0)):
        drawn = TokenSampler(sampler).draw(LOGITS)
        assert drawn.tolist() == [1, 0, 2]
        assert drawn.dtype == mx.int32
        drawn, finite = TokenSampler(sampler)(LOGITS, tree_of(3))
        assert drawn.tolist()[:2] == [1, 0]
        assert all(finite.tolist())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_samplers_get_float32_log_probabilities(dtype: mx.Dtype) -> None:
    seen = []

    def sampler(log_probs: mx.array) -> mx.array:
        seen.append(log_probs)
        return mx.argmax(log_probs, axis=-1)

    TokenSampler(sampler).draw(LOGITS.astype(dtype))
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
    drawn = TokenSampler(make_sampler(**options)).draw(mx.tile(LOGITS, (n, 1)))
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
    assert mx.all(TokenSampler(sampler)(mx.array(logits), tree_of(3))[1]).item()  # type: ignore[arg-type]
    logits[1, place] = np.nan
    assert not mx.all(TokenSampler(sampler)(mx.array(logits), tree_of(3))[1]).item()  # type: ignore[arg-type]


def test_forbidden_tokens_are_no_nan() -> None:
    logits = mx.array([[-mx.inf, 1.0, -mx.inf]])
    for sampler in (None, make_sampler(temp=1.0)):
        drawn, finite = TokenSampler(sampler)(logits, root_only(mx.array(0)))
        assert (drawn.item(), finite.item()) == (1, True)


def test_processors_get_the_text_and_the_drafts_above() -> None:
    seen: list[list[int]] = []

    def spy(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        assert logits.shape == (1, 4)
        return logits

    token_sampler = TokenSampler(processors=[spy], history=[7, 8, 2])
    # The root's draw 1 is its second child, whose draw 0 is the last node.
    tree = tree_from([2, 3, 1, 0], [0, 0, 0, 2])
    drawn, _ = token_sampler(mx.concatenate([LOGITS[:1], LOGITS[2:], LOGITS[1:]]), tree)
    assert seen == [[7, 8, 2], [7, 8, 2, 1], [7, 8, 2, 1, 0]]
    assert drawn.tolist() == [1, -1, 0, 2]


def test_processors_of_one_row_do_not_touch_the_next() -> None:
    """mlx-lm's processors write into the logits they are given."""
    processors = make_logits_processors(repetition_penalty=100.0)
    before = mx.array(LOGITS)
    token_sampler = TokenSampler(processors=processors, history=[1])
    drawn, _ = token_sampler(LOGITS, tree_from([1, 2, 0], [0, 0, 1]))
    assert drawn.tolist() == [2, 0, 2]
    assert mx.array_equal(LOGITS, before)


def by_history(tokens: mx.array, logits: mx.array) -> mx.array:
    """Any user's processor: what it adds depends on every token so far and on their order."""
    places = mx.arange(1, tokens.shape[0] + 1)
    mix = mx.sum((tokens + 1) * places * places)
    return logits + 3 * mx.sin(mix + 17 * mx.arange(logits.shape[-1]))


@examples(150)
@given(trees(), st.integers(0, 10**6), st.booleans(), st.lists(st.integers(0, 3), max_size=4))
def test_a_walk_draws_what_plain_decoding_draws(
    tree: tuple[list[int], list[int], list[bool]], seed: int, greedy: bool, past: list[int]
) -> None:
    """Along the accepted path every row is what one call with the text so far gives."""
    tokens, parents, alive = tree
    logits = mx.random.normal((len(tokens), 4), key=mx.random.key(seed))
    processors = [by_history, *make_logits_processors(repetition_penalty=1.3)]
    history = [*past, tokens[0]]
    sampler = None if greedy else deterministic
    token_sampler = TokenSampler(sampler, processors, list(history))
    drawn = token_sampler(logits, tree_from(tokens, parents, alive))[0].tolist()

    wanted, node, text = [-1] * len(tokens), 0, list(history)
    while True:
        row = logits[node : node + 1]
        for process in processors:
            row = process(mx.array(text), row)
        if sampler is None:
            token = mx.argmax(row).item()
        else:
            token = sampler(row - mx.logsumexp(row, keepdims=True)).item()
        wanted[node] = token
        text.append(token)
        path = reference.accepted(tokens, parents, alive, wanted, node)
        if len(path) == 1:
            break
        node = path[1]
    event(f"depth {len(text) - len(history) - 1}")
    assert drawn == wanted
    assert token_sampler.history == history


def deterministic(log_probs: mx.array) -> mx.array:
    """A sampler whose choice depends on the probabilities, but on no random number."""
    assert log_probs.shape == (1, 4)
    return mx.argmin(mx.abs(log_probs - mx.log(mx.array(0.3))), axis=-1)


XTC = {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.1}


def chain_outcomes(
    options: dict[str, float], number: int, at_once: bool
) -> Counter[tuple[int, ...]]:
    """Count what one step over root, 1, 3 emits; `at_once` draws all rows in one call."""
    tree = tree_from([2, 1, 3], [0, 0, 1])
    mx.random.seed(5)
    token_samplers = [TokenSampler(make_sampler(**options), history=[2]) for _ in range(number)]
    rows = mx.stack([c.draw(LOGITS) if at_once else c(LOGITS, tree)[0] for c in token_samplers])
    found: Counter[tuple[int, ...]] = Counter()
    for drawn in rows.tolist():
        path = reference.accepted([2, 1, 3], [0, 0, 1], [True] * 3, drawn)
        found[tuple(drawn[node] for node in path)] += 1
    return found


def test_xtc_draws_anew_for_every_row() -> None:
    """XTC decides once per call whether to cut; rows of one step must not share that."""
    rows = [distribution(np.array(LOGITS[n]), 1.0, xtc=(0.5, 0.1)) for n in range(3)]
    expected: dict[tuple[int, ...], float] = {}
    for a in range(4):
        if a != 1:
            expected[(a,)] = rows[0][a]
            continue
        for b in range(4):
            if b != 3:
                expected[(a, b)] = rows[0][a] * rows[1][b]
                continue
            for c in range(4):
                expected[(a, b, c)] = rows[0][a] * rows[1][b] * rows[2][c]
    assert chi_square_p(chain_outcomes(XTC, 800, at_once=False), expected) > 1e-3
    assert chi_square_p(chain_outcomes(XTC, 800, at_once=True), expected) < 1e-9


def test_a_nan_that_a_processor_makes_is_seen_on_the_path_alone() -> None:
    def spoil(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits * mx.where(tokens[-1] == 1, mx.nan, 1.0)

    tree = tree_from([2, 1, 0], [0, 0, 0])
    token_sampler = TokenSampler(processors=[spoil], history=[2])
    assert not mx.all(token_sampler(LOGITS, tree)[1]).item()
    # The root's draw is 1, which no child holds: what follows is not used.
    assert mx.all(token_sampler(LOGITS, tree_from([2, 3, 0], [0, 0, 0]))[1]).item()


def test_a_place_has_its_own_random_numbers_and_others_are_left_alone() -> None:
    logits = mx.zeros((1, 1000))
    mx.random.seed(4)
    before = mx.random.state[0].tolist()
    tree = root_only(mx.array(0))

    def at(place: int, seed: int = 9) -> int:
        token_sampler = TokenSampler(make_sampler(temp=1.0), history=[0] * place, seed=seed)
        return token_sampler(logits, tree)[0].item()

    first = [at(place) for place in range(1, 30)]
    assert first == [at(place) for place in range(1, 30)]
    assert len(set(first)) > 25
    assert sum(a == at(n, 10) for n, a in enumerate(first, start=1)) < 3
    assert mx.random.state[0].tolist() == before
    TokenSampler()
    assert mx.random.state[0].tolist() == before
    taken = [TokenSampler(make_sampler(temp=1.0)).seed for _ in range(2)]
    assert taken[0] != taken[1]
    mx.random.seed(4)
    assert TokenSampler(make_sampler(temp=1.0)).seed == taken[0]
