"""Whatever a governor of batches decides, texts stay; and it takes the way that is faster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream.batch.governor import LONGEST_PAUSE, BatchGovernor, governor_for
from mlx_specstream.config import DecodeConfig, TreeSpec
from tests.batch.engine import Request, batch_decoder, finish, prompt_of, step, streamed
from tests.batch.test_decode import assert_as_alone
from tests.support.engine import examples, small_model


class Whims(BatchGovernor):
    """Follows a list, and notes what it was told."""

    def __init__(self, wants: list[bool]) -> None:
        super().__init__(clock=lambda: 0.0)
        self.wants, self.at = wants, 0
        self.told: list[tuple[int, int, bool, bool]] = []

    def speculates(self, requests: int) -> bool:
        self.at += 1
        return self.wants[self.at % len(self.wants)]

    def after(
        self, requests: int, tokens: int, *, speculated: bool, undisturbed: bool, **_: int
    ) -> None:
        self.told.append((requests, tokens, speculated, undisturbed))


@examples(12)
@given(
    st.lists(st.booleans(), min_size=1, max_size=9),
    st.sampled_from(["inline", "deferred"]),
    st.sampled_from(["lossless", "shared"]),
    st.integers(0, 6),
)
def test_any_sequence_of_ways_gives_the_plain_texts(
    wants: list[bool], schedule: str, mode: str, late: int
) -> None:
    model = streamed(small_model(attention=0.25), mode=mode)
    assert model.streams is not None
    governor = Whims(wants)
    decoder = batch_decoder(model, "auto" if mode == "shared" else schedule, governor=governor)
    requests = [Request(decoder, prompt_of(n, n), 14) for n in (5, 2)]
    for _ in range(late):
        step(decoder, requests)
    requests.append(Request(decoder, prompt_of(7, 7), 14))
    finish(decoder, requests)
    for request in requests:
        assert_as_alone(request, model.streams)
    tokens = sum(len(request.tokens) for request in requests)
    assert sum(told[1] for told in governor.told) == tokens


def run(governor: BatchGovernor, now: list[float], passes: int, cost: dict[bool, float]) -> int:
    """Drive a governor; drafting brings 2 tokens a request. Return how many passes drafted."""
    drafted = 0
    for _ in range(passes):
        drafting = governor.speculates(4)
        now[0] += cost[drafting]
        drafted += drafting
        governor.after(4, 8 if drafting else 4, speculated=drafting, undisturbed=True)
    return drafted


@pytest.mark.parametrize("price", [1.3, 1.9, 2.2, 4.0])
def test_the_faster_way_is_taken(price: float) -> None:
    now = [0.0]
    governor = BatchGovernor(clock=lambda: now[0])
    drafted = run(governor, now, 4000, {True: price, False: 1.0})
    if price < 2:
        assert drafted > 3800
    else:
        assert drafted < 200


def test_another_text_or_machine_changes_the_way() -> None:
    now = [0.0]
    governor = BatchGovernor(clock=lambda: now[0])
    run(governor, now, 300, {True: 1.3, False: 1.0})
    assert run(governor, now, 300, {True: 3.0, False: 1.0}) < 80
    assert run(governor, now, 2 * LONGEST_PAUSE, {True: 1.0, False: 1.0}) > LONGEST_PAUSE // 2


def test_a_pause_and_others_prompts_do_not_count() -> None:
    now = [0.0]
    governor = BatchGovernor(clock=lambda: now[0])
    run(governor, now, 200, {True: 1.5, False: 1.0})
    for _ in range(50):
        now[0] += 60.0
        governor.after(4, 8, speculated=True, undisturbed=False)
    comparison = governor.comparisons[4]
    assert comparison.speculative.seconds == pytest.approx(1.5, rel=0.01)
    now[0] += 1.5
    governor.after(4, 8, speculated=True, undisturbed=True)
    now[0] += 3600
    governor.after(4, 8, speculated=True, undisturbed=True)
    assert comparison.speculative.seconds < 2.1


def test_who_names_a_tree_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(small_model())
    monkeypatch.setenv("SPECSTREAM_PLAN_SECONDS", "5")
    assert governor_for(model, None) is not None
    assert governor_for(model, None) is governor_for(model, DecodeConfig())  # it remembers
    assert governor_for(model, DecodeConfig(TreeSpec.parse("chain"))) is None
    monkeypatch.setenv("SPECSTREAM_PLAN_SECONDS", "0")
    other = streamed(small_model(seed=1))
    untimed = governor_for(other, None)
    assert untimed is not None
    assert untimed.clock is None
    assert untimed.speculates(4)
