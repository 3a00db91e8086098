"""Look-up where nothing else drafts: steps of it where they pay, plain decoding where they do not."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_sampler

from mlx_specstream.config import DecodeConfig
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.planner import lookup
from mlx_specstream.planner.adaptive import AutoDecoder
from mlx_specstream.planner.lookup import DEAR_ROWS, MARGIN, SIZES, LookUpPlanner, lookup_planner
from mlx_specstream.planner.settings import FusedAttention
from mlx_specstream.speculation.drafters.lookup import Continuations, LookUp
from mlx_specstream.speculation.result import LOOK_UP
from mlx_specstream.speculation.sampling import TokenSampler
from tests.planner.test_adaptive import INLINE, PLANS, Whims
from tests.speculation.test_lookup import assert_rows_are_fresh, compare, repetitive
from tests.support.engine import (
    decode,
    examples,
    plain,
    random_streams,
    small_model,
    stream_config,
)


class Clock:
    """Seconds that pass when told so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def chain_of(*given_: float) -> Continuations:
    """Return a chain of nodes with these chances given their parents."""
    chances, reached = [], 1.0
    for chance in given_:
        reached *= chance
        chances.append(reached)
    nodes = range(len(given_))
    return Continuations(
        list(nodes), [n - 1 for n in nodes], [n + 1 for n in nodes], chances, list(given_)
    )


def test_rows_are_chosen_by_what_they_yield_and_cost() -> None:
    planner = LookUpPlanner(slope=0.1)
    assert planner.choose(chain_of(*[0.99] * 31)) == max(SIZES)
    assert planner.choose(chain_of(0.9, 0.9, 0.9)) == 4
    assert planner.choose(chain_of(0.15)) == 0
    free = LookUpPlanner(slope=0.0)
    assert free.choose(chain_of(MARGIN + 0.01)) == 2
    assert free.choose(chain_of(MARGIN - 0.01)) == 0
    assert free.choose(chain_of()) == 0
    dear = LookUpPlanner(slope=1.0)
    assert dear.choose(chain_of(*[0.99] * 31)) == 0


def test_costs_follow_the_clock() -> None:
    clock = Clock()
    planner = LookUpPlanner(slope=0.05, clock=clock)
    planner.begin()
    for _ in range(20):
        clock.now += 0.01
        planner.after(0)
    assert planner.plain_s == pytest.approx(0.01)
    for _ in range(40):
        clock.now += 0.04
        planner.after(8)
    assert planner.cost(8) == pytest.approx(4.0, rel=0.01)
    assert planner.cost(4) > 2.5  # not timed: as much dearer than thought as its neighbour
    assert planner.choose(chain_of(*[0.9] * 3)) == 0
    planner.pause()
    clock.now += 100
    planner.resume()
    clock.now += 0.04
    planner.after(8)
    assert planner.cost(8) == pytest.approx(4.0, rel=0.01)


def test_one_interrupted_step_says_little() -> None:
    clock = Clock()
    planner = LookUpPlanner(slope=0.05, clock=clock, plain_s=0.01)
    planner.after(None)
    clock.now += 60
    planner.after(4)
    assert planner.cost(4) < 2


def test_promises_that_are_not_kept_are_believed_less() -> None:
    planner = LookUpPlanner(slope=0.1)
    assert planner.choose(chain_of(0.9, 0.9, 0.9)) > 0
    for _ in range(60):
        planner.accepted(2.4, 0)
    assert planner.choose(chain_of(0.9, 0.9, 0.9)) == 0
    for _ in range(60):
        planner.accepted(2.4, 3)
    assert planner.choose(chain_of(0.9, 0.9, 0.9)) > 0


def test_a_model_has_one_planner() -> None:
    model = StreamModel.plain(small_model())
    planner = lookup_planner(model)
    assert lookup_planner(model) is planner
    assert planner.clock is None, "where measuring is turned off, nothing is timed"
    assert planner.slope == DEAR_ROWS or mx.metal.is_available()
    assert tuple(planner.sizes) == SIZES


def test_passes_without_fused_attention_are_not_considered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lookup, "fused_attention", lambda _: FusedAttention(14, 2, 64))
    planner = lookup_planner(StreamModel.plain(small_model(seed=9)))
    assert planner.sizes == [2, 3, 4, 12, 16, 24, 32]
    assert planner.choose(chain_of(*[0.999] * 5)) == 4


def without_streams(
    backbone: Backbone, slope: float, token_sampler: TokenSampler | None = None
) -> AutoDecoder:
    return AutoDecoder(
        None,
        DecodeConfig(),
        token_sampler or TokenSampler(),
        None,
        lookup=LookUp(),
        lookups=LookUpPlanner(slope=slope, clock=Clock()),
        backbone=backbone,
    )


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.05, 0.3])
def test_without_streams_the_text_is_the_plain_one(slope: float, sampled: bool) -> None:
    accepted = single = 0
    for seed in range(4):
        backbone = Backbone(small_model(vocab=12, seed=seed, attention=0.4))
        prompt, sampler = repetitive(seed, 12), make_sampler(0.5) if sampled else None
        decoder = without_streams(backbone, slope, TokenSampler(sampler, seed=seed))
        run = decode(decoder, prompt, 40, snapshots=True)
        streams = random_streams(backbone.model, stream_config())
        wanted = plain(streams, prompt, 40, token_sampler=TokenSampler(sampler, seed=seed))
        compare(run, wanted, not sampled)
        assert_rows_are_fresh(run, prompt, backbone)
        assert all(o in (0, LOOK_UP) for step in run.steps for o in step.origins)
        accepted += run.accepted
        single += sum(not step.drafted for step in run.steps)
    assert accepted > 20
    assert single > 4


def test_a_text_that_quotes_nothing_is_decoded_plainly_and_pipelined() -> None:
    backbone = Backbone(small_model(vocab=64, attention=0.3))
    decoder = without_streams(backbone, DEAR_ROWS)
    prompt = random.Random(1).sample(range(64), 30)
    ahead = []
    original = decoder.step_ahead

    def noted(step, cache):  # type: ignore[no-untyped-def]
        ahead.append(original(step, cache))
        return ahead[-1]

    decoder.step_ahead = noted  # type: ignore[method-assign]
    run = decode(decoder, prompt, 12)
    plain_steps = [step for step in run.steps if not step.drafted]
    if len(set(run.tokens)) == len(run.tokens):
        assert len(plain_steps) == len(run.steps)
    assert sum(step is not None for step in ahead) >= len(plain_steps) // 2


@examples(40)
@given(st.data())
def test_beside_streams_any_sequence_of_plans_gives_the_plain_text(data: st.DataObject) -> None:
    draw = data.draw
    shared, seed = draw(st.booleans()), draw(st.integers(0, 5))
    streams = random_streams(
        small_model(draw(st.sampled_from(["llama", "qwen3"])), 3, 12, seed, attention=0.4),
        stream_config(mode="shared" if shared else "lossless"),
        seed,
    )
    choice = st.sampled_from([None, *(INLINE if shared else PLANS)])
    plans = draw(st.lists(choice, min_size=1, max_size=12))
    governor = LookedUpWhims(plans, draw(st.booleans()), price=draw(st.sampled_from([0.0, 0.05])))
    prompt = repetitive(seed, 12)
    sampler = make_sampler(1.0) if draw(st.booleans()) else None
    decoder = AutoDecoder(
        streams,
        DecodeConfig(),
        TokenSampler(sampler, seed=seed),
        governor,
        lookup=LookUp(),
        lookups=LookUpPlanner(slope=0.02, clock=Clock()),
    )
    run = decode(decoder, prompt, 30)
    wanted = plain(streams, prompt, 30, token_sampler=TokenSampler(sampler, seed=seed))
    compare(run, wanted, sampler is None)


class LookedUpWhims(Whims):
    """Whims for which a step costs a plain token, and `price` more per row."""

    def __init__(self, plans, foresees, price) -> None:  # type: ignore[no-untyped-def]
        super().__init__(plans, foresees)
        self.price = price

    def worth(self, plan):  # type: ignore[no-untyped-def]
        return 1.5, 1 + self.price * plan.rows(3)

    def looked_up(self, length: int) -> None:
        self.at += 1


def test_a_long_match_makes_the_tree_wider_where_rows_are_cheap() -> None:
    streams = random_streams(small_model(vocab=64, attention=0.0), stream_config())
    prompt = [*range(30), *range(8)]
    drafted = {}
    for price in (0.0, 2.0):
        governor = LookedUpWhims([PLANS[2]], True, price)
        decoder = AutoDecoder(
            streams,
            DecodeConfig(),
            TokenSampler(),
            governor,
            lookup=LookUp(),
            lookups=LookUpPlanner(slope=5.0, clock=Clock()),
        )
        run = decode(decoder, prompt, 6)
        drafted[price] = max(step.drafted for step in run.steps)
    assert drafted[0.0] > drafted[2.0] == 3
