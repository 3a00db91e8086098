"""The turns of a case both ways: mlx-lm's answers and rows first, then ours, compared with them.

Streams of shared mode are part of what is fine-tuned, and mlx-lm has no word for them: there a
token per pass, with its streams, plays the turns first (`alone`).

mlx-lm plays a scene once for all cases that share it; what it reuses between turns is what our
prefix cache says it can, so both decide alike and nothing of ours is in mlx-lm's way.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_specstream.apps.prefix import PrefixCache
from mlx_specstream.config import CacheConfig, DecodeConfig, TreeSpec
from mlx_specstream.errors import OptionError
from mlx_specstream.model.cache import KVCache, LayerKV, from_mlx_lm
from mlx_specstream.model.cache.kinds import check_quantised
from mlx_specstream.planner.adaptive import AutoDecoder
from mlx_specstream.planner.lookup import LookUpPlanner
from mlx_specstream.planner.settings import StepSetting
from mlx_specstream.speculation.decode import Decoder
from mlx_specstream.speculation.drafters import Drafter, NoDrafter
from mlx_specstream.speculation.drafters.lookup import LookUp
from mlx_specstream.speculation.drafting import DraftDecoder, StreamDecoder, drafter_decoder
from mlx_specstream.speculation.result import MaxTokens, StepResult
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.streams import Streams
from tests.support.drafters import KINDS, random_drafter
from tests.support.exactness.choices import processors_for
from tests.support.exactness.compare import Outcome, explain, rows_differ
from tests.support.exactness.draw import CONTINUE, Case, Scene
from tests.support.exactness.models import streams_for
from tests.support.exactness.reference import Reference
from tests.support.exactness.together import answer_together, can_be_batched
from tests.support.random_streams import with_table


class NotComputedError(Exception):
    """mlx-lm itself cannot compute a case here, such as 16-bit experts on the CPU."""


@dataclass(frozen=True)
class Played:
    """A turn as mlx-lm played it.

    whole: the text before the answer. reused: tokens of it that were in the cache. prompt: what
    mlx-lm was given. log_probs: (V,) at each of the tokens. rows: its cache afterwards, whose
    text ends with the answer. ahead: how many rows more those are than ours.
    """

    whole: list[int]
    reused: int
    prompt: list[int]
    tokens: list[int]
    log_probs: list[mx.array]
    rows: KVCache
    ahead: int = 1


def play(case: Case) -> Outcome:
    """Play a case's turns up to the first difference."""
    scene = playable(case.scene)
    case = replace(case, scene=scene)
    streams, prefix = _streams(scene), _prefix(scene)
    if case.beside >= 0 and not can_be_batched(streams):
        case = replace(case, beside=-1)
    if case.beside >= 0:
        return _play_together(case, streams)
    tokens = accepted = 0
    for number, wanted in enumerate(reference_turns(scene)):
        rest = prefix.reuse(wanted.whole)
        where = f"turn {number}, "
        reused = len(wanted.whole) - len(rest)
        if prefix.kv.depends_on_passes and reused < wanted.reused:
            # A path that ended beyond its answer made a window drop a row that is needed now.
            told = (
                f"{where}begun anew, where mlx-lm would reuse {wanted.reused} tokens: not compared"
            )
            return Outcome(case, "cut short", tokens, accepted, told)
        if prefix.kv.depends_on_passes and reused != wanted.reused:
            told = f"{where}reused {reused} tokens, not {wanted.reused}"
            return Outcome(case, "mismatch", tokens, accepted, told)
        processors = processors_for(scene, number, streams.backbone.vocab_size)
        token_sampler = TokenSampler(None, tuple(processors), list(wanted.prompt))
        decoder = _decoder(case, streams, token_sampler)
        found, _, right = _answer(decoder, scene, prefix.kv, rest, len(wanted.tokens))
        prefix.settle(wanted.whole + found)
        tokens, accepted = tokens + len(found), accepted + right
        if found != wanted.tokens:
            verdict, told = explain(
                found, wanted.tokens, wanted.log_probs, streams.backbone.dtype, scene
            )
            return Outcome(case, verdict, tokens, accepted, where + told)
        if told := rows_differ(prefix.kv, wanted.rows, streams.backbone.dtype, wanted.ahead):
            return Outcome(case, "mismatch", tokens, accepted, where + told)
    return Outcome(case, "identical", tokens, accepted)


def _play_together(case: Case, streams: Streams) -> Outcome:
    """Play a case's turns in batches, whose caches keep every row."""
    scene, backbone = case.scene, streams.backbone
    prefix = PrefixCache(KVCache(backbone.num_layers))
    tokens = accepted = 0
    for number, wanted in enumerate(reference_turns(scene)):
        rest, length = prefix.reuse(wanted.whole), len(wanted.tokens)
        answer, twin, kv = answer_together(
            case, streams, number, wanted.whole, rest, prefix.kv, wanted.prompt, length
        )
        both = [("", answer), ("twin, ", twin)]
        if (
            scene.mode == "shared" and number
        ):  # an answer's rows saw their streams, a prompt's do not
            both.pop()
        for name, one in both:
            found = one.tokens[:length]
            tokens, accepted = tokens + len(found), accepted + one.accepted
            if found != wanted.tokens:
                verdict, told = explain(
                    found, wanted.tokens, wanted.log_probs, backbone.dtype, scene
                )
                return Outcome(case, verdict, tokens, accepted, f"turn {number}, {name}{told}")
        kv.cut(len(wanted.whole) + length - 1)
        prefix.kv = kv
        prefix.settle(wanted.whole + wanted.tokens)
        if all(type(layer) is LayerKV for layer in wanted.rows.layers):
            told = rows_differ(kv, wanted.rows, backbone.dtype, wanted.ahead)
            if told:
                return Outcome(case, "mismatch", tokens, accepted, f"turn {number}, {told}")
    return Outcome(case, "identical", tokens, accepted)


def _decoder(case: Case, streams: Streams, token_sampler: TokenSampler) -> Decoder:
    """Return what decodes a turn of a case."""
    backbone, decode = streams.backbone, case.decode
    lookup = LookUp.of(backbone) if "lookup" in (decode.drafts or ()) else None
    if case.drafts in KINDS:
        scene = case.scene
        wide = scene.cache == "quantised"
        model = (scene.family, scene.model_seed, scene.precision, wide, scene.mode)
        drafter = _drafter(case.drafts, *model)
        drafting = drafter_decoder(drafter, decode, token_sampler, lookup=lookup)
        if decode.tree.kind == "product" or case.number % 2:
            return drafting
        whims = Whims(case.number, [None, StepSetting(drafting.tree)])
        return AutoDecoder(
            None, decode, token_sampler, whims, False, lookup, _lookups(), backbone, drafting
        )
    if backbone.is_recurrent:  # a state follows one path
        decode = DecodeConfig(tree=TreeSpec.parse("chain"))
    if case.drafts == "none":
        tree = decode.tree if decode.tree.kind != "product" else TreeSpec("best", rows=7)
        return DraftDecoder(NoDrafter(backbone), tree, token_sampler, lookup=lookup)
    if case.drafts == "auto":
        words = "chain1 chain chain2" if backbone.is_recurrent else "chain 4 9 5_inline"
        whims = Whims(case.number, [None, *map(_setting, words.split())])
        auto = replace(decode, schedule="auto", stream_nodes=0, prune=None)
        return AutoDecoder(streams, auto, token_sampler, whims, lookup=lookup, lookups=_lookups())
    decoder = StreamDecoder(streams, decode, token_sampler, lookup=lookup)
    return with_table(decoder) if case.drafts == "table" else decoder


def _setting(word: str) -> StepSetting:
    return StepSetting.parse(word.replace("_", " "))


def _lookups() -> LookUpPlanner:
    return LookUpPlanner(slope=0.01, clock=lambda: 0.0)


@lru_cache(maxsize=16)
def _drafter(kind: str, *model: Any) -> Drafter:
    """Return a random drafter over the model of a scene."""
    return random_drafter(kind, streams_for(*model).backbone)


class Whims:
    """A governor that changes its mind at random, between trees and plain decoding."""

    def __init__(self, seed: int, plans: Sequence[StepSetting | None]) -> None:
        self.plans, self.random = plans, random.Random(seed)

    def begin(self, length: int) -> StepSetting | None:
        del length
        return self.random.choice(self.plans)

    def after(
        self, result: StepResult, drafted_by: StepSetting | None, length: int
    ) -> StepSetting | None:
        del result, drafted_by
        return self.begin(length)

    def looked_up(self, length: int) -> None:
        """Go on as before."""

    def worth(self, plan: StepSetting) -> tuple[float, float]:
        return 1.5, 1 + 0.01 * plan.rows(3)

    def plain_tokens_ahead(self) -> int | None:
        return self.random.choice([1, 2])

    def pause(self) -> None:
        """Nothing is timed."""

    def resume(self) -> None:
        """Nothing is timed."""


@lru_cache(maxsize=2)
def reference_turns(scene: Scene) -> list[Played]:
    """Return the turns of a scene as mlx-lm plays them.

    Raises:
        NotComputedError: mlx-lm cannot.
    """
    if scene.mode == "shared":
        return alone(scene)
    streams, prefix = _streams(scene), _prefix(scene)
    places = [call.cache for call in streams.backbone.calls]
    reference = Reference(scene, streams.backbone.model, prefix.kv.fresh(), places)
    rng = np.random.default_rng(scene.seed)
    text: list[int] = []
    turns = []
    for number in range(len(scene.turns)):
        whole, goes_on = _said(scene, number, text, rng)
        reused = len(whole) - len(prefix.reuse(whole))
        prompt = reference.begin(whole, reused, goes_on and 0 < reused == len(text) - 1)
        processors = processors_for(scene, number, streams.backbone.vocab_size)
        try:
            tokens, log_probs = reference.answer(prompt, scene.turns[number].answered, processors)
        except RuntimeError as error:
            raise NotComputedError(str(error)) from error
        rows = from_mlx_lm(reference.caches)
        mx.eval(log_probs, rows.arrays)
        turns.append(Played(whole, reused, prompt, tokens, log_probs, rows))
        text = whole + tokens
        # The prefix cache gets no rows: it is asked what can be reused, which depends on lengths.
        prefix.kv.advance(len(text) - 1 - prefix.kv.length, generated=True)
        prefix.settle(text)
    return turns


def alone(scene: Scene) -> list[Played]:
    """Return the turns of a scene as the fine-tuned model plays them, a token per pass.

    Raises:
        NotComputedError: mlx cannot compute it here.
    """
    streams, prefix = _streams(scene), _prefix(scene)
    rng = np.random.default_rng(scene.seed)
    text: list[int] = []
    turns = []
    for number in range(len(scene.turns)):
        whole, _ = _said(scene, number, text, rng)
        rest = prefix.reuse(whole)
        processors = processors_for(scene, number, streams.backbone.vocab_size)
        token_sampler = TokenSampler(None, tuple(processors), list(whole))
        decoder = StreamDecoder(streams, DecodeConfig(tree=TreeSpec.parse("1")), token_sampler)
        try:
            tokens, logits, _ = _answer(
                decoder, scene, prefix.kv, rest, scene.turns[number].answered
            )
        except RuntimeError as error:
            raise NotComputedError(str(error)) from error
        text = whole + tokens
        prefix.settle(text)
        rows = prefix.kv.copy(prefix.kv.length)
        rows.turn_quantized()
        mx.eval(rows.arrays)
        turns.append(Played(whole, len(whole) - len(rest), whole, tokens, logits, rows, 0))
    return turns


def _said(
    scene: Scene, number: int, text: list[int], rng: np.random.Generator
) -> tuple[list[int], bool]:
    """Return the text before an answer, and whether all that was said and answered is in it."""
    vocab = _streams(scene).backbone.vocab_size
    turn = scene.turns[number]
    goes_on = turn.back == CONTINUE
    shared = len(text) if goes_on else len(text) * turn.back // 1000
    said: list[int] = rng.integers(0, vocab, turn.said).tolist()
    if shared < len(text):
        said[0] = (text[shared] + 1) % vocab  # what is changed begins here
    return [*text[:shared], *said], goes_on


@lru_cache(maxsize=64)
def playable(scene: Scene) -> Scene:
    """Return the scene, with the model's own kind of cache where mlx-lm refuses the drawn one."""
    streams = _streams(scene)
    windows = streams.backbone.windows
    if streams.backbone.is_recurrent and scene.cache == "rotating":
        # What can be reused depends on the states that a pass left, and on which of its first rows
        # a window keeps: mlx-lm, which can rewind neither, has no word for a second turn.
        scene = replace(scene, turns=scene.turns[:1])
    try:
        streams.backbone.new_cache(scene.cache_config)
        check_quantised(streams.forward, windows, scene.cache_config)
    except OptionError:
        return replace(scene, cache="model", cache_config=CacheConfig())
    return scene


def _streams(scene: Scene) -> Streams:
    wide_heads = scene.cache == "quantised"
    return streams_for(scene.family, scene.model_seed, scene.precision, wide_heads, scene.mode)


def _prefix(scene: Scene) -> PrefixCache:
    backbone = _streams(scene).backbone
    return PrefixCache(backbone.new_cache(scene.cache_config, scene.slack, scene.drop))


def _answer(
    decoder: Decoder, scene: Scene, kv: KVCache, rest: Sequence[int], length: int
) -> tuple[list[int], list[mx.array], int]:
    """Decode one answer; cut it to its length as `stream_generate` does.

    Returns its tokens, the logits (V,) of each, and how many drafts were accepted. Processors are
    told the text that the decoder's token_sampler holds.
    """
    start = kv.length
    decoder.prefill(rest[:-1], kv, chunk=scene.chunk)
    tokens: list[int] = []
    logits: list[mx.array] = []
    accepted = 0

    for result in decoder.steps(rest[-1], kv, MaxTokens(length)):
        tokens.extend(result.tokens)
        logits.extend(result.logits)
        accepted += result.accepted
    del tokens[length:]
    kv.cut(start + len(rest) + len(tokens) - 1)
    return tokens, logits, accepted
