"""Speculative sampling draws from the target's own distribution, whatever the drafts are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from mlx_specstream.config import DecodeConfig, PruneSpec, TreeSpec
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation import step as step_module
from mlx_specstream.speculation.accept import AcceptedPath, accept
from mlx_specstream.speculation.drafters import NoDrafter, Verified
from mlx_specstream.speculation.drafters.lookup import FileIndex, LookUp
from mlx_specstream.speculation.drafting import DraftDecoder, StreamDecoder
from mlx_specstream.speculation.result import MaxTokens
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.speculation.tree import DraftTree
from tests.reference import tree as reference
from tests.reference.sampling import chi_square_p, distribution
from tests.support import tiny
from tests.support.engine import plain, random_streams, stream_config, table_decoder

DRAWS = 4000
VOCAB = 8
PROMPT = [3, 1, 4]
# A false alarm in a thousand; the seeds are fixed, so a test that passes goes on passing.
LEVEL = 1e-3
SEED = 8
Accept = Callable[[DraftTree, mx.array, mx.array], AcceptedPath]

SAMPLERS = [
    {"temp": temp, **filters}
    for temp in (0.7, 1.0)
    for filters in ({}, {"top_p": 0.8}, {"top_k": 4}, {"top_p": 0.9, "top_k": 5})
]
SHAPES = {
    "chain": DecodeConfig(TreeSpec.parse("chain")),
    "tree": DecodeConfig(TreeSpec(rows=8)),
    "pruned chain": DecodeConfig(TreeSpec.parse("chain"), PruneSpec(keep=3)),
    "pruned tree": DecodeConfig(TreeSpec(rows=8), PruneSpec(keep=6, threshold=0.02)),
}


@lru_cache
def flat_model(seed: int) -> nn.Module:
    """Return a model that is sure of nothing, so that many sequences have a chance."""
    model = tiny.tiny_model(
        num_hidden_layers=3,
        hidden_size=32,
        intermediate_size=48,
        head_dim=8,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        seed=seed,
    )
    model.lm_head.weight = model.lm_head.weight * 0.5
    return model


@lru_cache
def streams_of(mode: str, seed: int = SEED) -> Streams:
    return random_streams(flat_model(seed), stream_config(mode=mode, num_streams=2), 1, 0.3)


def exact_logits(streams: Streams, text: tuple[int, ...]) -> np.ndarray:
    """Return the target's logits after `text`: mlx-lm's, or plain decoding's in shared mode."""
    if not streams.shared:
        return np.array(streams.backbone.model(mx.array([text]))[0, -1])
    # Tokens behind the prompt have streams, so they are fed one per step.
    cache = KVCache(streams.backbone.num_layers)
    streams.forward(mx.array(PROMPT[:-1]), cache)
    cache.advance(len(PROMPT) - 1)
    for token in text[len(PROMPT) - 1 :]:
        logits = decode_one(streams, token, cache)
    return np.array(logits)


def decode_one(streams: Streams, token: int, cache: KVCache) -> mx.array:
    config = DecodeConfig(TreeSpec(rows=1))
    decoder = StreamDecoder(streams, config, TokenSampler())
    (result,) = decoder.steps(token, cache, MaxTokens(1))
    return result.logits[0]


@lru_cache
def verified_draft(mode: str, shape: str) -> Verified:
    """Return the draft that follows a first greedy step, after its pass."""
    streams = streams_of(mode)
    decoder = table_decoder(streams, SHAPES[shape])
    cache = KVCache(streams.backbone.num_layers)
    decoder.prefill(PROMPT[:-1], cache)
    first = decoder.stepper.step(lone_root(PROMPT[-1]), cache)
    result = decoder.finish(first, cache)
    assert len(result.tokens) == 1
    return decoder.stepper.drafter.verify(first.next_tree, cache)


def lone_root(token: int) -> DraftTree:
    zero = mx.zeros((1,), dtype=mx.int32)
    return DraftTree(mx.array([token], dtype=mx.int32), zero, zero, depth=0)


@lru_cache
def all_logits(mode: str, shape: str) -> tuple[tuple[tuple[int, ...], np.ndarray], ...]:
    """Return (path of tokens below the root, exact logits there) of every node of the draft."""
    tree = verified_draft(mode, shape).tree
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    found: list[tuple[tuple[int, ...], np.ndarray]] = []
    for node, token in enumerate(tokens):
        path = (*found[parents[node]][0], token) if node else ()
        text = (*PROMPT, tokens[0], *path)
        found.append((path, exact_logits(streams_of(mode), text)))
    return tuple(found)


def outcomes(mode: str, shape: str, sampler: dict[str, float]) -> dict[tuple[int, ...], float]:
    """Return the exact probability of every sequence one step can emit, by enumeration."""
    tree = verified_draft(mode, shape).tree
    alive = [True] * tree.num_nodes if tree.alive is None else tree.alive.tolist()
    temperature, top_p, top_k = sampler["temp"], sampler.get("top_p", 0), sampler.get("top_k", 0)
    exact = [
        (path, distribution(logits, temperature, top_p, int(top_k)))
        for path, logits in all_logits(mode, shape)
    ]
    where = {path: node for node, (path, _) in enumerate(exact) if alive[node]}
    probabilities: dict[tuple[int, ...], float] = {}

    def walk(path: tuple[int, ...], so_far: float) -> None:
        for token, probability in enumerate(exact[where[path]][1]):
            longer = (*path, token)
            if longer in where:
                walk(longer, so_far * probability)
            else:
                probabilities[longer] = so_far * probability

    walk((), 1.0)
    return probabilities


def draws(
    verified: Verified, streams: Streams, token_sampler: TokenSampler, number: int
) -> mx.array:
    """Return `number` independent draws at every node of one verified draft, (number, T)."""
    logits = streams.backbone.head(verified.last)[0]
    mx.random.seed(11)
    drawn = token_sampler.draw(mx.tile(logits, (number, 1)))
    return mx.unflatten(drawn, 0, (number, verified.tree.num_nodes))


def emitted(verified: Verified, rows: mx.array, rule: Accept) -> list[tuple[int, ...]]:
    """Return what one step emits for each row (n, T) of draws."""
    paths = [rule(verified.tree, verified.seen, row) for row in rows]
    packed = mx.stack([mx.concatenate([p.length.reshape(1), p.tokens]) for p in paths])
    return [tuple(tokens[: length + 1]) for length, *tokens in packed.tolist()]


def walked(verified: Verified, rows: mx.array) -> Counter[tuple[int, ...]]:
    """Return how often each sequence comes out, by a plain walk, which is many times faster.

    One row of every kind goes through `accept` too, and must give the same.
    """
    tree = verified.tree
    alive = [True] * tree.num_nodes if tree.alive is None else tree.alive.tolist()
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    kinds: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows.tolist()):
        nodes = reference.accepted(tokens, parents, alive, row)
        kinds.setdefault(tuple(row[node] for node in nodes), []).append(number)
    firsts = mx.array([numbers[0] for numbers in kinds.values()])
    assert emitted(verified, mx.take(rows, firsts, axis=0), accept) == list(kinds)
    return Counter({sequence: len(numbers) for sequence, numbers in kinds.items()})


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_one_step_emits_the_targets_distribution(mode: str, shape: str) -> None:
    streams, verified = streams_of(mode), verified_draft(mode, shape)
    for options in SAMPLERS:
        expected = outcomes(mode, shape, options)
        token_sampler = TokenSampler(make_sampler(**options))
        counts = walked(verified, draws(verified, streams, token_sampler, DRAWS))
        assert 0.03 < sum(n for s, n in counts.items() if len(s) > 1) / DRAWS < 0.97
        p = chi_square_p(counts, expected)
        assert p > LEVEL, f"{options}: p = {p:.2g}"


def first_child(tree: DraftTree, seen: mx.array, drawn: mx.array) -> AcceptedPath:
    """Accept node 1 unseen: what a careless rule does."""
    tokens = mx.array(drawn)
    tokens[0] = tree.tokens[1]
    return accept(tree, seen, tokens)


def wrong_parent(tree: DraftTree, seen: mx.array, drawn: mx.array) -> AcceptedPath:
    """Read the second token from the root's row."""
    path = accept(tree, seen, drawn)
    tokens = mx.where(mx.arange(path.tokens.shape[0]) > 0, mx.roll(path.tokens, 1), path.tokens)
    return AcceptedPath(path.node, path.length, path.nodes, tokens)


@pytest.mark.parametrize("rule", [first_child, wrong_parent])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_wrong_rules_are_found_out(shape: str, rule: Accept) -> None:
    """The power of the test above: these must fail it, clearly."""
    expected = outcomes("lossless", shape, {"temp": 1.0})
    token_sampler = TokenSampler(make_sampler(temp=1.0))
    verified = verified_draft("lossless", shape)
    rows = draws(verified, streams_of("lossless"), token_sampler, 600)
    assert chi_square_p(Counter(emitted(verified, rows, accept)), expected) > LEVEL
    assert chi_square_p(Counter(emitted(verified, rows, rule)), expected) < 1e-9


def test_a_slightly_wrong_temperature_is_found_out() -> None:
    """So must a temperature of 0.85 where 1 was asked for."""
    expected = outcomes("lossless", "tree", {"temp": 1.0})
    token_sampler = TokenSampler(make_sampler(temp=0.85))
    verified = verified_draft("lossless", "tree")
    counts = walked(verified, draws(verified, streams_of("lossless"), token_sampler, DRAWS))
    assert chi_square_p(counts, expected) < 1e-4


def three_tokens(mode: str, options: dict[str, float]) -> dict[tuple[int, ...], float]:
    """Return the exact probability of every text of three tokens after the prompt."""
    streams = streams_of(mode)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, probability in found.items():
            logits = exact_logits(streams, (*PROMPT, *text))
            exact = distribution(
                logits, options["temp"], options.get("top_p", 0), int(options.get("top_k", 0))
            )
            for token in np.flatnonzero(exact):
                longer[(*text, int(token))] = probability * exact[token]
        found = longer
    return found


def first_tokens(decoder: StreamDecoder, cache: KVCache, number: int) -> list[int]:
    text: list[int] = []
    steps = decoder.steps(PROMPT[-1], cache, MaxTokens(number))
    for result in steps:
        text += result.tokens
    return text[:number]


@pytest.mark.parametrize("rows", [0, 9])
def test_looking_up_does_not_bias_what_is_drawn(rows: int) -> None:
    """Alone, or (0 rows) in the streams' tree: a file says what follows the prompt, often rightly."""
    streams, options = streams_of("lossless"), {"temp": 1.0}
    wanted = three_tokens("lossless", options)
    likely = max(wanted, key=wanted.__getitem__)
    files = FileIndex([*PROMPT, *likely, 0, 2, *PROMPT, likely[0], 7, 1])
    mx.random.seed(3)
    counts: Counter[tuple[int, ...]] = Counter()
    looked_up = 0
    for _ in range(150):
        token_sampler = TokenSampler(make_sampler(**options), history=list(PROMPT))
        lookup = LookUp(files=files)
        decoder: DraftDecoder = StreamDecoder(streams, SHAPES["tree"], token_sampler, lookup=lookup)
        if rows:
            drafter = NoDrafter(streams.backbone)
            decoder = DraftDecoder(drafter, TreeSpec(rows=rows), token_sampler, lookup=lookup)
        cache = KVCache(streams.backbone.num_layers)
        decoder.prefill(PROMPT[:-1], cache)
        text: list[int] = []
        for result in decoder.steps(PROMPT[-1], cache, MaxTokens(3)):
            text += result.tokens
            looked_up += sum(result.looked_up)
        counts[tuple(text[:3])] += 1
    assert looked_up > 20
    assert chi_square_p(counts, wanted) > LEVEL


@pytest.mark.parametrize(
    ("mode", "shape", "options"),
    [
        ("lossless", "tree", {"temp": 1.0}),
        ("shared", "pruned chain", {"temp": 0.7, "top_k": 3}),
    ],
)
def test_the_loop_emits_the_targets_distribution(
    mode: str, shape: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of three tokens, each from a fresh run of the whole loop."""
    expected = three_tokens(mode, options)

    def run(draws: int) -> float:
        mx.random.seed(5)
        token_sampler = TokenSampler(make_sampler(**options))
        decoder = table_decoder(streams_of(mode), SHAPES[shape], token_sampler=token_sampler)
        cache = KVCache(streams_of(mode).backbone.num_layers)
        decoder.prefill(PROMPT[:-1], cache)
        counts: Counter[tuple[int, ...]] = Counter()
        for _ in range(draws):
            cache.rewind(len(PROMPT) - 1)
            text = first_tokens(decoder, cache, 3)
            counts[tuple(text)] += 1
        return chi_square_p(counts, expected)

    assert run(150) > LEVEL
    monkeypatch.setattr(step_module, "accept", first_child_if_any)
    assert run(150) < 1e-6


def first_child_if_any(tree: DraftTree, seen: mx.array, drawn: mx.array) -> AcceptedPath:
    return first_child(tree, seen, drawn) if tree.num_nodes > 1 else accept(tree, seen, drawn)


def test_plain_sampling_has_the_same_distribution() -> None:
    options = {"temp": 1.0, "top_k": 4}
    mx.random.seed(2)

    def run() -> tuple[int, ...]:
        token_sampler = TokenSampler(make_sampler(**options))
        return tuple(plain(streams_of("lossless"), PROMPT, 2, token_sampler=token_sampler).tokens)

    counts = Counter(run() for _ in range(150))
    expected: dict[tuple[int, ...], float] = Counter()
    for text, probability in three_tokens("lossless", options).items():
        expected[text[:2]] += probability
    assert chi_square_p(counts, expected) > LEVEL
