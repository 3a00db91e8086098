"""Ctrl-C at any line, and answers that are left open: the cache stays at the text handed out."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_specstream
from mlx_specstream import DecodeConfig, KVCache, stream_generate
from mlx_specstream.batch import BatchDecoder
from mlx_specstream.config import CacheConfig, PruneSpec, TreeSpec
from mlx_specstream.errors import OptionError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.speculation.drafters.lookup.text import TextIndex
from mlx_specstream.speculation.sampling import TokenSampler
from tests.batch.engine import as_model
from tests.support import tiny
from tests.support.drafters import KINDS, random_drafter
from tests.support.engine import random_streams, small_model, stream_config

PROMPT = list(b"abcabcab")
PACKAGE = Path(mlx_specstream.__file__).parent
WATCHED = (
    "batch/",
    "model/cache/",
    "speculation/decode.py",
    "speculation/drafters/",
    "speculation/drafting.py",
    "speculation/plain.py",
    "speculation/step.py",
    "generation/run.py",
    "planner/adaptive.py",
)
STEP = int(os.environ.get("INTERRUPT_STEP", "397"))  # lines between two interrupts; 1: at every one
CACHES = {
    "plain": CacheConfig(),
    "rotating": CacheConfig(max_kv_size=12),
    "quantised": CacheConfig(kv_bits=8, kv_group_size=32, quantized_kv_start=14),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"speculative": False},
    "tree": {"config": DecodeConfig(TreeSpec(rows=8))},
}
LOOKED_UP = ("streams", "lookup")
WAYS_OF_DRAFTING: dict[str, dict[str, Any]] = {
    **WAYS,
    "chain": {"config": DecodeConfig(TreeSpec(kind="chain", branching=1), schedule="deferred")},
    "inline": {"config": DecodeConfig(TreeSpec(rows=6), schedule="inline")},
    "pruned": {"config": DecodeConfig(TreeSpec(rows=8), PruneSpec(4), schedule="deferred")},
    "looked up": {"config": DecodeConfig(TreeSpec(rows=8), drafts=LOOKED_UP)},
    "look-up alone": {"config": DecodeConfig(TreeSpec(rows=6), drafts=("lookup",))},
    "look-up or plain": {"config": DecodeConfig(drafts=("lookup",))},
    **{kind: {"config": DecodeConfig(TreeSpec(rows=6))} for kind in KINDS},
}


@pytest.fixture(scope="module")
def model() -> StreamModel:
    backbone = small_model(layers=3, vocab=256, attention=0.3, hidden_size=64, head_dim=32)
    return as_model(random_streams(backbone, stream_config(num_streams=3), scale=0.05))


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return tiny.byte_tokenizer()


class AtLine:
    """Raises KeyboardInterrupt at the `number`-th line of the watched files that is run."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.files: dict[str, bool] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if name not in self.files:
            inside = name.removeprefix(f"{PACKAGE}/")
            self.files[name] = inside.startswith(WATCHED)
        if not self.files[name]:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def reached(line: int, call: Callable[[], object]) -> bool:
    """Call with Ctrl-C at a line, and tell whether that was reached."""
    sys.settrace(AtLine(line))
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def interrupted(
    model: StreamModel, tokenizer: TokenizerWrapper, cache: KVCache, line: int, **options: Any
) -> tuple[list[int], bool]:
    """Return the tokens handed out until Ctrl-C at a line, and whether that was reached."""
    given: list[int] = []
    answer = stream_generate(model, tokenizer, PROMPT, 10, prompt_cache=cache, **options)

    def take() -> None:
        for response in answer:
            given.append(response.token)

    return given, reached(line, take)


def answer_of(
    model: StreamModel, prompt: list[int], cache: KVCache, tokens: int, **options: Any
) -> list[int]:
    """Return the tokens of an answer behind what `cache` holds."""
    tokenizer = tiny.byte_tokenizer()
    answer = stream_generate(model, tokenizer, prompt, tokens, prompt_cache=cache, **options)
    return [response.token for response in answer]


def right_after_ctrl_c(
    model: StreamModel, cache: KVCache, line: int, whole: list[int], **options: Any
) -> bool:
    """Interrupt an answer at a line and go on; tell whether there is such a line."""
    given, stopped = interrupted(model, tiny.byte_tokenizer(), cache, line, **options)
    if stopped:
        at = f"line event {line}, {len(given)} tokens out"
        assert given == whole[: len(given)]
        assert cache.length == (len(PROMPT) + len(given) - 1 if given else cache.length), at
        rest = (PROMPT + given)[cache.length :]
        on = answer_of(model, rest, cache, 6, **options)
        assert on == whole[len(given) : len(given) + 6], at
    return stopped


@pytest.mark.parametrize("way", list(WAYS_OF_DRAFTING))
@pytest.mark.parametrize("kind", list(CACHES))
def test_ctrl_c_at_any_line_leaves_the_cache_at_the_text(
    model: StreamModel, kind: str, way: str
) -> None:
    options, caches = WAYS_OF_DRAFTING[way], CACHES[kind]
    if way in KINDS:
        model = replace(model, streams=None, drafter=random_drafter(way, model.backbone))
    whole = answer_of(model, PROMPT, model.backbone.new_cache(caches), 20, **options)
    first = 1 + 41 * list(WAYS_OF_DRAFTING).index(way) % STEP
    line = first
    while right_after_ctrl_c(model, model.backbone.new_cache(caches), line, whole, **options):
        line += STEP
    assert line > first + 3 * STEP


@pytest.mark.parametrize("way", list(WAYS))
def test_ctrl_c_while_an_answer_ends_leaves_the_cache_at_the_text(
    model: StreamModel, way: str
) -> None:
    """Also where the cache is being set right: at each of the last lines."""
    options = WAYS[way]
    whole = answer_of(model, PROMPT, model.backbone.new_cache(), 20, **options)
    counted, cache = AtLine(10**9), model.backbone.new_cache()
    sys.settrace(counted)
    try:
        answer_of(model, PROMPT, cache, 10, **options)
    finally:
        sys.settrace(None)
    last = 10**9 - counted.left
    stopped = [
        right_after_ctrl_c(model, model.backbone.new_cache(), line, whole, **options)
        for line in range(last - 150, last + 1)
    ]
    assert sum(stopped) > 100


def test_ctrl_c_at_any_line_of_a_batch_leaves_the_caches_that_joined_it(model: StreamModel) -> None:
    """They hold as much of their prompts as was computed, and go on from there."""
    prompts = [PROMPT, list(b"xyzzy xyzzy xy")]

    def run(caches: list[KVCache], line: int) -> bool:
        decoder = BatchDecoder(model, prefill_budget=5)
        for prompt, cache in zip(prompts, caches, strict=True):
            decoder.add(prompt[cache.length :], cache=cache)
        return reached(line, lambda: [decoder.step() for _ in range(6)])

    def caches() -> list[KVCache]:
        made = [model.backbone.new_cache() for _ in prompts]
        for prompt, cache in zip(prompts, made, strict=True):
            model.backbone.forward(mx.array(prompt[:3]), cache)
            cache.advance(3)
        return made

    def after(prompt: list[int], cache: KVCache) -> list[int]:
        return answer_of(model, prompt[cache.length :], cache, 5)

    whole = [after(prompt, cache) for prompt, cache in zip(prompts, caches(), strict=True)]
    line, cases = 1, 0
    while run(joined := caches(), line):
        for prompt, cache, wanted in zip(prompts, joined, whole, strict=True):
            assert 3 <= cache.length < len(prompt)
            assert after(prompt, cache) == wanted, f"line event {line}"
        line, cases = line + STEP, cases + 1
    assert cases > 3


def test_ctrl_c_at_any_line_leaves_an_index_that_is_whole() -> None:
    text, line, more = list(b"abcabdabcabcabd"), 1, True
    fresh = TextIndex()
    fresh.extend(text)
    while more:
        index = TextIndex()
        index.extend(text[:9])
        more = reached(line, lambda: (index.extend(text[9:]), index.truncate(6)))  # noqa: B023
        index.truncate(5)
        index.extend(text[5:])
        assert index.tokens == text
        assert index.occurrences() == fresh.occurrences()
        line += 1
    assert line > 100


@pytest.mark.parametrize("taken", [1, 2, 3, 4])
@pytest.mark.parametrize("theirs", [False, True])
def test_an_answer_left_open_is_settled_when_the_next_begins(
    model: StreamModel, tokenizer: TokenizerWrapper, taken: int, theirs: bool
) -> None:
    def cache() -> Any:
        return make_prompt_cache(model.model) if theirs else model.backbone.new_cache()

    def turn(given: list[int], used: Any) -> list[int]:
        rest = [7, 8] if theirs else [*given[-1:], 7, 8]
        return [r.token for r in stream_generate(model, tokenizer, rest, 6, prompt_cache=used)]

    one, other = cache(), cache()
    still_open = stream_generate(model, tokenizer, PROMPT, 12, prompt_cache=one)
    given = [next(still_open).token for _ in range(taken)]
    closed = stream_generate(model, tokenizer, PROMPT, 12, prompt_cache=other)
    assert [next(closed).token for _ in range(taken)] == given
    closed.close()  # type: ignore[attr-defined]
    assert turn(given, one) == turn(given, other)
    assert list(still_open) == []


def test_a_cache_in_the_middle_of_a_pass_is_refused(
    model: StreamModel, tokenizer: TokenizerWrapper
) -> None:
    cache = model.backbone.new_cache()

    def again(tokens: mx.array, logits: mx.array) -> mx.array:
        stream_generate(model, tokenizer, PROMPT, 4, prompt_cache=cache)
        return logits

    answer = stream_generate(
        model, tokenizer, PROMPT, 4, prompt_cache=cache, logits_processors=[again]
    )
    with pytest.raises(OptionError, match="this prompt cache is in use"):
        next(answer)


def test_answers_do_not_keep_their_caches_alive(
    model: StreamModel, tokenizer: TokenizerWrapper
) -> None:
    from mlx_specstream.generation.run import _answers

    gc.collect()
    before = len(_answers)
    for _ in range(3):
        cache = model.backbone.new_cache()
        next(stream_generate(model, tokenizer, PROMPT, 4, prompt_cache=cache))
    del cache
    gc.collect()
    assert len(_answers) == before


@pytest.mark.parametrize("speculative", [False, True])
def test_a_seed_gives_one_text_whatever_was_cached(
    model: StreamModel, tokenizer: TokenizerWrapper, speculative: bool
) -> None:
    def text(cached: int) -> list[int]:
        cache = model.backbone.new_cache()
        if cached:
            model.backbone.forward(mx.array(PROMPT[:cached]), cache)
            cache.advance(cached)
        answer = stream_generate(
            model, tokenizer, PROMPT[cached:], 12, prompt_cache=cache, seed=5,
            sampler=make_sampler(1.0), speculative=speculative,
        )  # fmt: skip
        return [response.token for response in answer]

    assert text(0) == text(3) == text(7)


def test_the_history_is_not_made_anew_at_every_step(
    model: StreamModel, tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grows on the device; where no processor reads it, it is not there at all."""
    lengths: list[int] = []
    original = TokenSampler._history

    def counted(self: TokenSampler, length: int) -> mx.array:
        lengths.append(-1 if self._text is None else self._text.shape[0])
        return original(self, length)

    monkeypatch.setattr(TokenSampler, "_history", counted)
    seen: list[list[int]] = []

    def look(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())  # type: ignore[arg-type]
        return logits

    options: dict[str, Any] = {"sampler": make_sampler(1.0), "seed": 1, "speculative": False}
    list(stream_generate(model, tokenizer, PROMPT, 6, **options))
    assert lengths == []
    answer = list(stream_generate(model, tokenizer, PROMPT, 6, logits_processors=[look], **options))
    text = PROMPT + [response.token for response in answer]
    assert seen[:6] == [text[: len(PROMPT) + n] for n in range(6)]
    assert lengths.count(-1) == 1


def test_every_layer_may_hold_streams() -> None:
    backbone = small_model(layers=3, vocab=12, seed=1)
    for mode in ("lossless", "shared"):
        streams = random_streams(backbone, stream_config(num_msa_layers=3, mode=mode))
        model, tokens = as_model(streams), [1, 2, 3]
        texts = [
            [r.token for r in stream_generate(model, tiny.byte_tokenizer(), tokens, 12, **way)]
            for way in WAYS.values()
        ]
        assert texts[0] == texts[1]
