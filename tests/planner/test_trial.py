"""A drafter that is not streams drafts while that is faster than plain decoding, and steps aside else."""

from __future__ import annotations

import itertools
import random
import weakref
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.generation.generate import decoder_for
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.planner import StepSetting, trial
from mlx_specstream.planner.adaptive import AutoDecoder
from mlx_specstream.planner.lookup import LookUpPlanner
from mlx_specstream.planner.trial import DrafterTrial
from mlx_specstream.speculation.decode import Decoder, decode
from mlx_specstream.speculation.drafters.lookup import LookUp
from mlx_specstream.speculation.drafting import DraftDecoder, drafter_decoder
from mlx_specstream.speculation.plain import PlainDecoder
from mlx_specstream.speculation.result import MaxTokens, StepResult
from mlx_specstream.speculation.sampling import TokenSampler
from tests.support.drafters import KINDS, random_drafter
from tests.support.engine import committed_rows, small_model
from tests.support.tiny_models import tiny_random_model

PLAN = StepSetting(TreeSpec(rows=5, depth=5))
PLAIN = 0.1  # seconds of a plain token


@dataclass
class Clocked:
    """A trial by a clock of our own."""

    step: float  # seconds of a step that verifies drafts
    now: float = 0.0
    measured: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trial = DrafterTrial(PLAN, self.time_plain, lambda: self.now)

    def time_plain(self, context: int) -> float:
        self.measured.append(context)
        return PLAIN

    def answer(self, tokens: int, a_step: int, length: int = 10) -> int:
        """Play an answer; return how many of its tokens came of steps with drafts."""
        plan, drafted_by, drafted, done = self.trial.begin(length), None, 0, 0
        while done < tokens:
            self.now += PLAIN if plan is None else self.step
            got = a_step if drafted_by is not None else 1
            done, drafted = done + got, drafted + (got if drafted_by else 0)
            result = StepResult(list(range(got)), got - 1, mx.zeros((got, 1)))
            following = self.trial.after(result, drafted_by, length + done)
            drafted_by = plan if following is not None else None
            self.trial.pause()
            self.trial.resume()
            plan = following
        return drafted


def test_a_drafter_that_pays_drafts_on() -> None:
    clocked = Clocked(step=0.2)
    for _ in range(4):
        assert clocked.answer(61, a_step=3) == 60  # in 20 steps behind the root's own
    assert clocked.measured == [256]


def test_one_that_does_not_pay_costs_a_few_steps_and_then_an_answer_now_and_then() -> None:
    clocked = Clocked(step=0.3)
    drafted = [clocked.answer(60, a_step=2) for _ in range(40)]
    assert drafted[0] == 2 * trial.TRIAL
    tried = [number for number, tokens in enumerate(drafted) if tokens]
    assert [after - before - 1 for before, after in itertools.pairwise(tried)] == [
        0,
        1,
        2,
        4,
        8,
        16,
    ]


def test_short_answers_are_judged_together() -> None:
    clocked = Clocked(step=0.4)
    drafted = [clocked.answer(5, a_step=2) > 0 for _ in range(60)]
    assert drafted[:7] == [True] * 6 + [False]  # two trials of six steps each
    assert sum(drafted) < 30


def test_a_small_loss_is_borne_until_it_is_sure() -> None:
    clocked = Clocked(step=0.22)  # 0.91 of plain decoding
    drafted = clocked.answer(200, a_step=2)
    assert 2 * trial.TRIAL < drafted < 40


def test_a_gain_forgives_what_was_before() -> None:
    clocked = Clocked(step=0.4)
    for _ in range(12):
        clocked.answer(40, a_step=2)
    waited = clocked.trial._wait
    assert waited >= 4
    clocked.step = 0.15
    for _ in range(waited + 1):
        clocked.answer(40, a_step=2)
    assert clocked.trial._wait == 0


def test_plain_decoding_tells_what_a_plain_token_takes_now() -> None:
    clocked = Clocked(step=0.2)
    clocked.trial.plain_s[256] = 0.01  # of a machine that was faster
    assert clocked.answer(400, a_step=3) < 30
    assert clocked.trial.plain_s[256] == pytest.approx(PLAIN, rel=0.05)


def test_time_away_is_nobodys() -> None:
    clocked = Clocked(step=0.2)
    clocked.trial.begin(10)
    result = StepResult([1, 2, 3], 4, mx.zeros((3, 1)))
    for _ in range(20):
        clocked.now += 0.2
        assert clocked.trial.after(result, PLAN, 10) == PLAN
        clocked.trial.pause()
        clocked.now += 60  # somebody reads
        clocked.trial.resume()


def test_long_texts_are_held_against_tokens_behind_long_texts() -> None:
    clocked = Clocked(step=0.2)
    for length in (10, 300, 500, 100_000):
        clocked.answer(8, a_step=3, length=length)
    assert clocked.measured == [256, 512, 2048]


@dataclass
class Moods:
    """A governor that drafts or not as a coin falls."""

    plan: StepSetting
    coin: random.Random
    drafted: int = 0

    def begin(self, length: int) -> StepSetting | None:
        del length
        return self.plan if self.coin.random() < 0.7 else None

    def after(
        self, result: StepResult, drafted_by: StepSetting | None, length: int
    ) -> StepSetting | None:
        self.drafted += result.drafted if drafted_by is not None else 0
        return self.begin(length)

    def looked_up(self, length: int) -> None:
        pass

    def worth(self, plan: StepSetting) -> tuple[float, float]:
        return 1.5, 1 + 0.01 * plan.rows(5)

    def plain_tokens_ahead(self) -> int | None:
        return 1

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("looks_up", [False, True], ids=["alone", "with-look-up"])
def test_whenever_it_steps_aside_the_text_is_plain_decodings(kind: str, looks_up: bool) -> None:
    backbone = Backbone(small_model("llama", vocab=12))
    wanted = two_answers(PlainDecoder(backbone, TokenSampler()), backbone)
    for seed in range(4):
        sampler = TokenSampler()
        lookup = LookUp.of(backbone) if looks_up else None
        drafting = drafter_decoder(random_drafter(kind, backbone), DecodeConfig(), sampler)
        moods = Moods(StepSetting(drafting.tree), random.Random(seed))
        lookups = LookUpPlanner(slope=0.01, clock=lambda: 0.0) if looks_up else None
        decoder = AutoDecoder(
            None, DecodeConfig(), sampler, moods, False, lookup, lookups, backbone, drafting
        )
        assert two_answers(decoder, backbone) == wanted
        assert moods.drafted


@pytest.mark.parametrize("kind", KINDS)
def test_while_it_drafts_it_drafts_as_ever(kind: str) -> None:
    """The drafter reads prompts and is told of answers as in the loop that always drafts."""
    backbone = Backbone(small_model("llama", vocab=12))
    found = []
    for governed in (False, True):
        sampler = TokenSampler()
        decoder: DraftDecoder | AutoDecoder
        decoder = drafting = drafter_decoder(
            random_drafter(kind, backbone), DecodeConfig(), sampler
        )
        if governed:
            on = DrafterTrial(StepSetting(drafting.tree), lambda _: 1e9)
            decoder = AutoDecoder(
                None, DecodeConfig(), sampler, on, backbone=backbone, drafting=drafting
            )
        decoder.keep_drafts = True
        cache = KVCache(backbone.num_layers)
        for prompt in ([3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4], [2, 7, 1], [5]):
            cache.rewind(max(0, cache.length - 2))  # as where an answer is cut short
            steps = list(decode(decoder, prompt, cache, MaxTokens(20)))
            found.append([step.draft and step.draft.tokens for step in steps])
    assert found[:3] == found[3:]


def two_answers(decoder: PlainDecoder | AutoDecoder, backbone: Backbone) -> list[int]:
    """Answer a prompt and one behind that; the cache's rows are those of a fresh one each time."""
    cache, text, said = KVCache(backbone.num_layers), [], []
    for prompt in ([3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4], [2, 7, 1]):
        text += prompt
        decoder.token_sampler.history[:] = text
        steps = list(decode(decoder, prompt, cache, MaxTokens(30)))
        tokens = [token for step in steps for token in step.tokens][:30]
        said += tokens
        text += tokens[:-1]
        cache.rewind(len(text))
        fresh = KVCache(backbone.num_layers)
        backbone.forward(mx.array(text), fresh)
        fresh.advance(len(text))
        for found, right in zip(committed_rows(cache), committed_rows(fresh), strict=True):
            np.testing.assert_allclose(found, right, atol=1e-4)
    return said


def test_the_trial_of_a_loaded_model(
    tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = StreamModel.plain(tiny_llama)
    model = replace(plain, drafter=random_drafter("draft model", plain.backbone))

    def made(words: str) -> Decoder:
        return decoder_for(model, DecodeConfig.of_words(words), TokenSampler(), True)

    assert type(made("auto")) is DraftDecoder  # measuring is turned off
    monkeypatch.setenv("SPECSTREAM_PLAN_SECONDS", "5")
    assert type(made("8")) is DraftDecoder
    decoder = made("auto")
    assert isinstance(decoder, AutoDecoder)
    tried = decoder.governor
    assert isinstance(tried, DrafterTrial)
    assert tried.begin(1000) == tried.plan
    assert 0 < tried.plain_s[1024] < 10
    again = made("auto")
    assert isinstance(again, AutoDecoder)
    assert again.governor is tried


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_a_plain_token_is_timed_beside_any_layers(name: str) -> None:
    backbone = Backbone(tiny_random_model(name))
    assert 0 < trial._plain_timer(weakref.ref(backbone))(512) < 10
