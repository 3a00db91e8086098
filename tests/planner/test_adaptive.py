"""Whatever a governor decides, between any two steps, the tokens are those of plain decoding."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_sampler

from mlx_specstream.config import DecodeConfig
from mlx_specstream.model.cache import KVCache
from mlx_specstream.planner.adaptive import AutoDecoder
from mlx_specstream.planner.settings import StepSetting
from mlx_specstream.speculation.result import StepResult
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from tests.reference.sampling import chi_square_p
from tests.speculation.test_decode import prompt_of
from tests.speculation.test_distribution import (
    LEVEL,
    PROMPT,
    first_tokens,
    streams_of,
    three_tokens,
)
from tests.support.engine import (
    assert_same_text,
    committed_rows,
    decode,
    examples,
    plain,
    random_streams,
    small_model,
    stream_config,
)

PLANS = [
    StepSetting.parse(text)
    for text in ("chain1", "chain", "4", "9", "2^2", "4 inline", "chain inline")
]
INLINE = [plan for plan in PLANS if plan.schedule == "inline"]


@dataclass
class Whims:
    """A governor that follows a list of plans, and notes what it was told."""

    plans: Sequence[StepSetting | None]
    foresees: bool = True
    told: list[tuple[StepSetting | None, StepResult, int]] = field(default_factory=list)
    at: int = 0
    paused: bool = False

    def begin(self, length: int) -> StepSetting | None:
        return self.plans[0]

    def after(
        self, result: StepResult, drafted_by: StepSetting | None, length: int
    ) -> StepSetting | None:
        self.told.append((drafted_by, result, length))
        self.at += 1
        return self.plans[self.at % len(self.plans)]

    def plain_tokens_ahead(self) -> int | None:
        if not self.foresees:
            return None
        following = [self.plans[(self.at + n) % len(self.plans)] for n in range(1, 9)]
        return next((n for n, plan in enumerate(following, start=1) if plan is not None), None)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        assert self.paused
        self.paused = False


def auto_decoder(
    streams: Streams, governor: Whims, token_sampler: TokenSampler | None = None
) -> AutoDecoder:
    return AutoDecoder(streams, DecodeConfig(), token_sampler or TokenSampler(), governor)


@examples(25)
@given(st.data())
def test_any_sequence_of_plans_gives_the_plain_text(data: st.DataObject) -> None:
    draw = data.draw
    family = draw(st.sampled_from(["llama", "qwen3"]))
    shared = draw(st.booleans())
    layers, seed = draw(st.integers(3, 4)), draw(st.integers(0, 3))
    streams = random_streams(
        small_model(family, layers, 12, seed),
        stream_config(mode="shared" if shared else "lossless", num_streams=3),
        seed,
    )
    choice = st.sampled_from([None, *(INLINE if shared else PLANS)])
    governor = Whims(draw(st.lists(choice, min_size=1, max_size=12)), draw(st.booleans()))
    prompt = prompt_of(draw(st.integers(1, 30)), 12, seed)
    sampler = make_sampler(1.0) if draw(st.booleans()) else None
    run = decode(auto_decoder(streams, governor, TokenSampler(sampler, seed=seed)), prompt, 24)
    wanted = plain(streams, prompt, 24, token_sampler=TokenSampler(sampler, seed=seed))
    if sampler is None:
        assert_same_text(run.tokens, wanted)
    else:  # a draw may flip where rounding moves a probability across it; here none does
        assert run.tokens[:24] == wanted.tokens
    assert run.cache.length == len(prompt) - 1 + len(run.tokens)
    fresh = KVCache(len(run.cache.layers))
    if not shared:
        streams.backbone.forward(mx.array([*prompt, *run.tokens[:-1]]), fresh)
        fresh.advance(run.cache.length)
        for found, wanted in zip(committed_rows(run.cache), committed_rows(fresh), strict=True):
            for a, b in zip(found, wanted, strict=True):
                assert abs(a - b).max() < 1e-4


def test_the_governor_learns_who_drafted_what() -> None:
    streams = random_streams(small_model(vocab=12), stream_config(num_streams=3))
    four, nine = StepSetting.parse("4"), StepSetting.parse("9")
    # A restart drafts a tree; the plan that follows verifies it and builds the next.
    governor = Whims([None, None, four, four, nine, nine, None, None])
    run = decode(auto_decoder(streams, governor), [1, 2, 3], 60)
    for drafted_by, result, _ in governor.told:
        assert result.drafted == (0 if drafted_by is None else drafted_by.rows(3) - 1)
    first = [drafted_by for drafted_by, _, _ in governor.told[:8]]
    #         plain plain root  4's   4's   9's   plain plain
    assert first == [None, None, None, four, four, nine, None, None]
    lengths = [length for _, _, length in governor.told]
    assert lengths[-1] == run.cache.length == 2 + len(run.tokens)


def test_plain_decoding_schedules_nothing_that_is_thrown_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A governor that says how long it decodes plainly costs no pass at a switch."""
    from mlx_specstream.speculation.plain import PlainDecoder

    passes: list[int] = []
    original = PlainDecoder._pass

    def counted(self: PlainDecoder, *arguments: object, **options: object) -> object:
        passes.append(1)
        return original(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(PlainDecoder, "_pass", counted)
    streams = random_streams(small_model(vocab=12), stream_config(num_streams=3))
    for foresees, wasted in ((True, 0), (False, 3)):
        passes.clear()
        plans = [None, None, None, StepSetting.parse("chain")] * 3 + [
            StepSetting.parse("chain")
        ] * 50
        governor = Whims(plans, foresees)
        decode(auto_decoder(streams, governor), [1, 2, 3], 30)
        assert len(passes) == 9 + wasted


def test_drafts_are_kept_where_there_are_any() -> None:
    streams = random_streams(small_model(vocab=12), stream_config(num_streams=3))
    decoder = auto_decoder(streams, Whims([None, StepSetting.parse("4"), StepSetting.parse("4")]))
    decoder.keep_drafts = True
    run = decode(decoder, [1, 2, 3], 20)
    assert {len(step.draft.tokens) for step in run.steps if step.draft} == {1, 4}
    assert any(step.draft is None for step in run.steps)


def test_processors_see_the_right_history() -> None:
    """A repetition ban gives the same text, plainly or not."""

    def ban(tokens: mx.array, logits: mx.array) -> mx.array:
        logits[:, tokens[-4:]] = -1e9
        return logits

    streams = random_streams(small_model(vocab=12), stream_config(num_streams=3))
    wanted = plain(streams, [1, 2, 3], 24, token_sampler=TokenSampler(None, (ban,)))
    governor = Whims([None, None, StepSetting.parse("6"), StepSetting.parse("chain2"), None])
    decoder = auto_decoder(streams, governor, TokenSampler(None, (ban,)))
    assert_same_text(decode(decoder, [1, 2, 3], 24).tokens, wanted)


def test_switching_does_not_change_what_a_seed_draws() -> None:
    streams = random_streams(small_model(vocab=12), stream_config(num_streams=3))

    def token_sampler() -> TokenSampler:
        return TokenSampler(make_sampler(temp=1.0, xtc_probability=0.5), seed=6)

    wanted = plain(streams, [1, 2, 3], 24, token_sampler=token_sampler())
    for whims in ([None], [StepSetting.parse("6"), None, None, StepSetting.parse("chain2")]):
        decoder = auto_decoder(streams, Whims(whims), token_sampler())
        assert_same_text(decode(decoder, [1, 2, 3], 24).tokens, wanted)


def test_switching_does_not_bias_what_is_drawn() -> None:
    streams, options = streams_of("lossless"), {"temp": 1.0}
    mx.random.seed(3)
    luck = random.Random(5)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(150):
        governor = Whims([luck.choice([None, *PLANS]) for _ in range(4)], luck.random() < 0.5)
        decoder = auto_decoder(
            streams, governor, TokenSampler(make_sampler(**options), history=list(PROMPT))
        )
        cache = KVCache(streams.backbone.num_layers)
        decoder.prefill(PROMPT[:-1], cache)
        counts[tuple(first_tokens(decoder, cache, 3))] += 1  # type: ignore[arg-type]
    assert chi_square_p(counts, three_tokens("lossless", options)) > LEVEL


def test_a_plan_reads_what_it_writes() -> None:
    for plan in (*PLANS, StepSetting.parse("16:8"), StepSetting.parse("16:8 inline")):
        assert StepSetting.parse(plan.name) == plan
    assert StepSetting.parse("16:8").upper_rows(4) == 8
