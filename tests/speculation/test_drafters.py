"""Drafters that are not streams: what they draft, what they write, and what they keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.drafters import Drafter
from mlx_specstream.speculation.drafters.draft_model import DraftModelDrafter
from mlx_specstream.speculation.drafters.lookup import LookUp
from mlx_specstream.speculation.drafters.own_rows import OwnRows
from mlx_specstream.speculation.drafters.trained import trained_drafter
from mlx_specstream.speculation.drafting import DraftDecoder, drafter_decoder
from mlx_specstream.speculation.plain import PlainDecoder
from mlx_specstream.speculation.result import MaxTokens, StepResult
from mlx_specstream.speculation.sampling import TokenSampler
from tests.reference import drafters as reference
from tests.reference import tree as reference_tree
from tests.reference.sampling import chi_square_p
from tests.support.drafters import KINDS, drafter_config, random_drafter, random_drafter_tensors
from tests.support.engine import committed_rows, small_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
TREES = ("chain", "chain2", "1", "9", "3^2")
WITH_ROWS = ("hydra++", "eagle", "eagle3", "draft model")
TOLERANCE = 2e-4


def backbone_of(family: str = "llama", vocab: int = 12, **sizes: object) -> Backbone:
    return Backbone(small_model(family, vocab=vocab, **sizes))


def drafted(
    drafter: Drafter, tree: TreeSpec, token_sampler: TokenSampler | None = None
) -> DraftDecoder:
    return drafter_decoder(drafter, DecodeConfig(tree), token_sampler or TokenSampler())


def run(
    decoder: DraftDecoder | PlainDecoder,
    prompt: list[int],
    max_tokens: int,
    cache: KVCache,
    after: Callable[[list[StepResult]], object] = lambda _: None,
) -> list[StepResult]:
    """Answer `prompt` behind what the cache holds; `after` is told of the steps so far at each."""
    decoder.token_sampler.history[:] = prompt
    decoder.begin(prompt, cache)
    decoder.prefill(prompt[:-1], cache, chunk=3)
    steps = []
    for step in decoder.steps(prompt[-1], cache, MaxTokens(max_tokens)):
        steps.append(step)
        after(steps)
    return steps


def tokens_of(steps: list[StepResult]) -> list[int]:
    return [token for step in steps for token in step.tokens]


def plainly(backbone: Backbone, prompt: list[int], max_tokens: int) -> list[int]:
    decoder = PlainDecoder(backbone, TokenSampler())
    return tokens_of(run(decoder, prompt, max_tokens, backbone.new_cache()))


# ---- what they draft ---------------------------------------------------------------------------


def best_scores(next_log_probs, text: list[int], rows: int, depth: int, branching: int):
    """The cumulative log-probabilities of the best paths below a text, best first."""
    paths = {(): 0.0}
    level = {(): 0.0}
    for _ in range(depth):
        grown = {}
        for path, score in level.items():
            found = next_log_probs(text, path)
            for token in np.argsort(-found)[:branching]:
                grown[(*path, int(token))] = score + float(found[token])
        level = grown
        paths |= grown
    return paths, sorted(paths.values(), reverse=True)[:rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "ranked"), [("llama", True), ("qwen3", False)])
def test_drafts_are_those_of_the_slow_reference(kind: str, family: str, ranked: bool) -> None:
    model = small_model(family, vocab=12)
    backbone = Backbone(model)
    if kind == "draft model":
        draft = small_model("qwen2", layers=2, vocab=12, seed=4)
        drafter: Drafter = DraftModelDrafter(backbone, Backbone(draft))
        next_log_probs = reference.of_model(draft)
    else:
        config = drafter_config(kind, 32, 12, backbone.num_layers)
        tensors = random_drafter_tensors(config)
        drafter = trained_drafter(backbone, config, tensors)
        next_log_probs = reference.of_trained(model, config, tensors)
    depth = min(3, drafter.depth)
    spec = TreeSpec(rows=9, branching=3, depth=depth)
    if not ranked:  # all candidates of every path
        spec = TreeSpec(kind="product", branching=3, depth=depth)
    decoder = DraftDecoder(drafter, spec, TokenSampler(), keep_drafts=True)
    text, seen = list(PROMPT), 0
    for step in run(decoder, PROMPT, 8, backbone.new_cache()):
        assert step.draft is not None
        assert step.draft.tokens[0] == text[-1]
        if step.drafted:
            drafted = [
                tuple(path[1:])
                for path in reference_tree.paths(step.draft.tokens, step.draft.parents)
            ]
            paths, best = best_scores(next_log_probs, text, 9, depth, 3)
            assert len(set(drafted)) == len(drafted)
            if ranked:
                found = sorted((paths[path] for path in drafted), reverse=True)
                np.testing.assert_allclose(found, best, atol=1e-3)
            else:
                assert set(drafted) == set(paths)
            seen += 1
        text += step.tokens
    assert seen > 2


def test_trees_of_eagle_are_no_product_of_marginals() -> None:
    """A node's candidates depend on its path: two parents of a level propose other tokens."""
    drafter = random_drafter("eagle", backbone_of())
    decoder = DraftDecoder(drafter, TreeSpec.parse("3^2"), TokenSampler(), keep_drafts=True)
    below = []
    for step in run(decoder, PROMPT, 12, drafter.backbone.new_cache()):
        if step.drafted:
            assert step.draft is not None
            tokens = step.draft.tokens
            below += [tuple(tokens[4 + 3 * i : 7 + 3 * i]) for i in range(3)]
    assert len(set(below)) > len(below) // 2


# ---- what they write ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tree"), list(product(KINDS, TREES)))
def test_the_text_is_that_of_plain_decoding(kind: str, tree: str) -> None:
    """The likeliest tokens, and drawn ones: a seed gives the same text whatever is drafted."""
    seed = TREES.index(tree)
    backbone = backbone_of(("llama", "qwen2", "qwen3")[seed % 3], seed=seed)
    drafter = random_drafter(kind, backbone, seed)
    for sampler in (None, make_sampler(temp=4.0)):
        plain = PlainDecoder(backbone, TokenSampler(sampler, seed=7))
        expected = tokens_of(run(plain, PROMPT, 24, backbone.new_cache()))
        decoder = drafted(drafter, TreeSpec.parse(tree), TokenSampler(sampler, seed=7))
        cache = backbone.new_cache()
        after_steps: list[list[tuple[np.ndarray, np.ndarray]]] = []

        def note(_: object, cache: KVCache = cache, rows: list[Any] = after_steps) -> None:
            rows.append(committed_rows(cache))

        steps = run(decoder, PROMPT, 24, cache, note)
        found = tokens_of(steps)
        assert found[:24] == expected[:24]
        fresh = backbone.new_cache()
        decoder.prefill((PROMPT + found)[: cache.length], fresh)
        wanted = committed_rows(fresh)
        assert len(after_steps) == len(steps)
        for rows in after_steps:
            for ours, theirs in zip(rows, wanted, strict=True):
                for mine, whole in zip(ours, theirs, strict=True):
                    length = mine.shape[2]
                    np.testing.assert_allclose(mine, whole[:, :, :length], atol=TOLERANCE)
    assert sum(step.accepted for step in steps) > 0 or tree not in ("9", "3^2")


@pytest.mark.parametrize("kind", KINDS)
def test_two_tokens_are_drawn_from_the_models_own_distribution(kind: str) -> None:
    backbone = backbone_of(vocab=6)
    drafter = random_drafter(kind, backbone)
    logits = lambda text: np.array(backbone.model(mx.array([text]))[0, -1])  # noqa: E731
    softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()  # noqa: E731
    start = PROMPT[:3]
    first = softmax(logits(start))
    expected = {
        (a, b): float(first[a] * after)
        for a in range(6)
        for b, after in enumerate(softmax(logits([*start, a])))
    }
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(300):
        decoder = drafted(
            drafter, TreeSpec(rows=4), TokenSampler(make_sampler(temp=1.0), seed=seed)
        )
        a, b, *_ = tokens_of(run(decoder, start, 2, backbone.new_cache()))
        counts[a, b] += 1
    assert chi_square_p(counts, expected) > 1e-3


# ---- what they keep ----------------------------------------------------------------------------


def own_rows(cache: KVCache) -> OwnRows:
    assert isinstance(cache.companion, OwnRows)
    return cache.companion


def assert_rows_are_fresh(drafter: Drafter, cache: KVCache, text: list[int]) -> None:
    """The drafter's rows are those of a prompt that was read at once."""
    decoder = DraftDecoder(drafter, TreeSpec(rows=1), TokenSampler())
    fresh = drafter.backbone.new_cache()
    decoder.begin(text, fresh)
    decoder.prefill(text[: cache.length], fresh)
    ours, theirs = own_rows(cache), own_rows(fresh)
    assert ours.first == 0
    rows = min(ours.kv.length, theirs.kv.length)
    assert rows >= cache.length - 1
    for mine, wanted in zip(ours.kv.layers, theirs.kv.layers, strict=True):
        for one, two in zip(mine.read(rows), wanted.read(rows), strict=True):
            np.testing.assert_allclose(np.array(one), np.array(two), atol=TOLERANCE)
    assert ours.known == theirs.known
    if ours.features is not None and theirs.features is not None and ours.known:
        one, two = ours.features[:, : ours.known], theirs.features[:, : ours.known]
        np.testing.assert_allclose(np.array(one), np.array(two), atol=TOLERANCE)


@pytest.mark.parametrize("kind", WITH_ROWS)
@pytest.mark.parametrize("tree", ["chain", "9"])
def test_own_rows_follow_steps_edits_and_copies(kind: str, tree: str) -> None:
    backbone = backbone_of()
    drafter = random_drafter(kind, backbone)
    decoder = drafted(drafter, TreeSpec.parse(tree))
    cache = backbone.new_cache()
    text = list(PROMPT)

    def check(steps: list[StepResult]) -> None:
        assert_rows_are_fresh(drafter, cache, text + tokens_of(steps))

    text += tokens_of(run(decoder, text, 12, cache, check))
    assert_rows_are_fresh(drafter, cache, text)
    for kept, said in ((15, [7, 0, 7]), (4, [2]), (1, [5, 5]), (0, [8, 3])):
        cache.rewind(kept)
        text = [*text[:kept], *said]
        text += tokens_of(run(decoder, said, 9, cache))
        expected = plainly(backbone, text[: kept + len(said)], 9)
        assert text[kept + len(said) :][:9] == expected[:9]
        assert_rows_are_fresh(drafter, cache, text)
    other = cache.copy(5)
    branch = [*text[:5], 6]
    branch += tokens_of(run(decoder, [6], 9, other))
    assert_rows_are_fresh(drafter, other, branch)
    # The copy did not touch what it was made from.
    assert_rows_are_fresh(drafter, cache, text)


@pytest.mark.parametrize("kind", WITH_ROWS)
def test_text_that_the_drafter_has_not_read_is_left_out(kind: str) -> None:
    """Plain decoding in between, and a cache that others filled: the text stays the model's own."""
    backbone = backbone_of()
    drafter = random_drafter(kind, backbone)
    cache = backbone.new_cache()
    decoder = drafted(drafter, TreeSpec(rows=6))
    text = list(PROMPT)
    text += tokens_of(run(decoder, text, 6, cache))
    said = text[cache.length :]
    text += tokens_of(run(PlainDecoder(backbone, TokenSampler()), said, 5, cache))
    unread = cache.length
    said = text[cache.length :]
    text += tokens_of(run(decoder, said, 8, cache))
    assert own_rows(cache).first == unread
    assert text[len(PROMPT) :][:19] == plainly(backbone, PROMPT, 19)[:19]
    # Of a rewind behind its beginning nothing is left, of one into it what was read.
    cache.rewind(unread + 3)
    assert 2 <= own_rows(cache).kv.length <= 4
    cache.rewind(2)
    assert own_rows(cache).kv.length == 0
    answer = tokens_of(run(decoder, [1, 1], 6, cache))
    assert answer[:6] == plainly(backbone, [*PROMPT[:2], 1, 1], 6)[:6]


def test_a_draft_model_with_windows_drafts_beyond_them() -> None:
    backbone = backbone_of()
    draft = Backbone(small_model(layers=3, vocab=12, seed=9, window=6))
    drafter = DraftModelDrafter(backbone, draft)
    decoder = drafted(drafter, TreeSpec(rows=6))
    cache = backbone.new_cache()
    answer = tokens_of(run(decoder, PROMPT, 30, cache))
    assert answer[:30] == plainly(backbone, PROMPT, 30)[:30]
    cache.rewind(9)
    text = [*(PROMPT + answer)[:9], 4]
    found = tokens_of(run(decoder, [4], 9, cache))
    assert found[:9] == plainly(backbone, text, 9)[:9]


def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    for name in ("tolist", "item"):
        original = getattr(mx.array, name)

        def counted(array, *, original=original, name=name):
            waits.append(name)
            return original(array)

        monkeypatch.setattr(mx.array, name, counted)
    for kind in KINDS:
        drafter = random_drafter(kind, backbone_of())
        decoder = drafted(drafter, TreeSpec(rows=6))
        waits.clear()
        steps = run(decoder, PROMPT, 12, drafter.backbone.new_cache())
        assert len(waits) == len(steps), kind


@pytest.mark.parametrize("kind", KINDS)
def test_look_up_joins_the_drafters_tree(kind: str) -> None:
    """The tree is grown a second time, from the first level on, with what look-up found."""
    backbone = backbone_of()
    drafter = random_drafter(kind, backbone)
    said = [*PROMPT, *PROMPT, *PROMPT[:3]]
    lookup = LookUp.of(backbone, None, ())
    config = DecodeConfig(TreeSpec(rows=6))
    decoder = drafter_decoder(drafter, config, TokenSampler(), keep_drafts=True, lookup=lookup)
    steps = run(decoder, said, 20, cache := backbone.new_cache())
    found = tokens_of(steps)
    assert found[:20] == plainly(backbone, said, 20)[:20]
    assert any(any(step.looked_up) for step in steps)
    if kind in WITH_ROWS:
        assert_rows_are_fresh(drafter, cache, said + found)
