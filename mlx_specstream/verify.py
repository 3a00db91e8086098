"""Replays prompts plainly and speculatively and explains every divergence.

Both runs are greedy, with the same model, cache and limits, so in float32 their tokens are the
same, as long as MLX keeps float32 products exact (`machine.rounds_float32`). In 16 bits, and where
it does not, a pass over several rows rounds otherwise than a pass over one, and where the two
likeliest tokens are a rounding error apart, either may win. A divergence is a near-tie if
plain decoding itself puts both tokens that close to the likeliest; anything else is a bug.

How much rounding matters is also shown by measurement, without the engine under test: the text
read in one pass of many rows gives plain decoding's logits but for rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from .config import DecodeConfig
from .generation.generate import stream_generate
from .machine import rounds_float32
from .speculation.statistics import SpeculationStats

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .loading.load import StreamModel

OnToken = Callable[[str], None]

FLOAT32_BOUND = 1e-3
# Distance between 1 and the next number. Logits are sums that went through every layer, so
# rounding moves them by a few such steps of their own size.
_EPSILON = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
_TF32_EPSILON = 2.0**-10
_STEPS = 4
FEWEST = 16  # tokens of an answer that its time cuts short


def rounding_bound(dtype: mx.Dtype, largest_logit: float) -> float:
    """Return how far apart two logits may be that rounding alone can put in either order.

    float32: 1e-3. float16 and bfloat16: four steps of the largest logit's size, which for a
    logit of 20 is 0.08 and 0.63. float32 with factors of 10 bits counts as float16.
    """
    epsilon = _EPSILON.get(dtype, _TF32_EPSILON if rounds_float32() else 0.0)
    return max(FLOAT32_BOUND, _STEPS * epsilon * abs(largest_logit))


@dataclass(frozen=True)
class Replayed:
    """One way of answering a prompt. seconds: after the prompt, from first to last token."""

    tokens: list[int]
    text: str
    stats: SpeculationStats
    seconds: float


@dataclass(frozen=True)
class Divergence:
    """The first token at which two answers differ, judged by plain decoding's logits there.

    position: its index in the answer. margin: how far apart the two tokens are, plain minus
    speculative. gap: between the two largest logits. distance: how far below the largest the
    worse of the two tokens is. bound: how far apart rounding alone may put two logits in this
    `precision`. moved: by how much logits differ when the same text is read in one pass, None
    in shared mode, where that is another computation. A token is -1 where an answer was over.
    """

    position: int
    plain_token: int
    speculative_token: int
    gap: float
    distance: float
    bound: float
    margin: float = 0.0
    precision: str = "float32"
    moved: float | None = None
    plain_text: str = ""
    speculative_text: str = ""

    @property
    def near_tie(self) -> bool:
        """Tell whether rounding explains it."""
        return self.distance <= self.bound

    def __str__(self) -> str:
        tokens = (
            f"token {self.position}: plain {self.plain_token} {self.plain_text!r}, speculative "
            f"{self.speculative_token} {self.speculative_text!r}"
        )
        measured = "" if self.moved is None else f"; one pass over the text: {self.moved:.2g}"
        rounding = f"{self.precision} rounds by up to {self.bound:.2g}{measured}"
        if self.near_tie:
            verdict = "a near-tie, within rounding"
        else:
            verdict = "a real mismatch, not rounding"
        return (
            f"{tokens}; in plain decoding they are {abs(self.margin):.2g} apart, the worse "
            f"{self.distance:.2g} below the best (top two {self.gap:.2g} apart); {rounding}: "
            f"{verdict}"
        )


@dataclass(frozen=True)
class Comparison:
    """A prompt answered both ways; `divergence` is None if the tokens are identical."""

    plain: Replayed
    speculative: Replayed
    divergence: Divergence | None

    @property
    def verdict(self) -> str:
        """Return `identical`, `near-tie` or `mismatch`."""
        if self.divergence is None:
            return "identical"
        return "near-tie" if self.divergence.near_tie else "mismatch"


def replay(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    max_tokens: int,
    config: DecodeConfig | None,
    on_token: OnToken = lambda _: None,
    until: float = inf,
) -> Replayed:
    """Answer a prompt greedily: speculatively with `config`, plainly if it is None.

    until: the time of `time.perf_counter` after which the answer ends, though not before `FEWEST` tokens.
    """
    tokens: list[int] = []
    pieces: list[str] = []
    stats = SpeculationStats()
    first = time.perf_counter()
    for response in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        config=config,
        speculative=config is not None,
    ):
        if not tokens:
            first = time.perf_counter()
        tokens.append(response.token)
        pieces.append(response.text)
        stats = response.stats
        on_token(response.text)
        if len(tokens) >= FEWEST and time.perf_counter() > until:
            break
    return Replayed(tokens, "".join(pieces), stats, time.perf_counter() - first)


def compare(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    plain: Replayed,
    speculative: Replayed,
) -> Comparison:
    """Compare two answers to a prompt token by token; explain the first difference."""
    position = first_difference(plain.tokens, speculative.tokens)
    if position is None:
        return Comparison(plain, speculative, None)
    logits = plain_logits(model, tokenizer, prompt, position)
    moved = None
    if model.streams is None or not model.streams.shared:
        fresh = reference_logits(model, tokenizer, prompt, plain.tokens, position)
        moved = cast(float, mx.abs(logits - fresh).max().item())
    tokens = tuple(
        run.tokens[position] if position < len(run.tokens) else -1 for run in (plain, speculative)
    )
    texts = [tokenizer.decode([token]) if token >= 0 else "" for token in tokens]
    divergence = judge(logits, model.backbone.dtype, position, tokens[0], tokens[1])
    divergence = replace(
        divergence,
        precision=precision_of(model),
        moved=moved,
        plain_text=texts[0],
        speculative_text=texts[1],
    )
    return Comparison(plain, speculative, divergence)


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Return the first index at which two answers differ (one may just end), None if none."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return None if len(first) == len(second) else min(len(first), len(second))


def precision_of(model: StreamModel) -> str:
    """Describe what a model computes in: `float32`, `bfloat16 with 4-bit mxfp4 weights`.

    float32 with factors of 10 bits is called `float32 (TF32)`.
    """
    kinds = {
        f"{module.bits}-bit {getattr(module, 'mode', 'affine')}"
        for module in model.model.modules()
        if hasattr(module, "bits") and hasattr(module, "group_size")
    }
    name = str(model.backbone.dtype).rpartition(".")[2]
    if model.backbone.dtype == mx.float32 and rounds_float32():
        name = "float32 (TF32)"
    return f"{name} with {' and '.join(sorted(kinds))} weights" if kinds else name


def plain_logits(
    model: StreamModel, tokenizer: TokenizerWrapper, prompt: Sequence[int], position: int
) -> mx.array:
    """Return the logits (V,) float32 that plain decoding drew token `position` from, again."""
    *_, last = stream_generate(model, tokenizer, prompt, max_tokens=position + 1, speculative=False)
    return last.logits.astype(mx.float32)


def reference_logits(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    tokens: Sequence[int],
    position: int,
) -> mx.array:
    """Return the logits (V,) float32 that a fresh plain pass draws token `position` from.

    The prompt and the tokens before `position` are read as one prompt. In shared mode, where
    generated tokens are computed beside their streams, they are generated again instead.
    """
    again = model.streams is not None and model.streams.shared
    text = list(prompt) if again else [*prompt, *tokens[:position]]
    more = position + 1 if again else 1
    *_, last = stream_generate(model, tokenizer, text, max_tokens=more, speculative=False)
    return last.logits.astype(mx.float32)


def judge(
    logits: mx.array, dtype: mx.Dtype, position: int, plain: int, speculative: int
) -> Divergence:
    """Judge a divergence between two tokens by the reference's logits (V,) float32."""
    second, best = cast(list[float], mx.sort(logits)[-2:].tolist())
    values = [
        cast(float, logits[token].item()) if token >= 0 else -float("inf")
        for token in (plain, speculative)
    ]
    largest = cast(float, mx.abs(logits).max().item())
    return Divergence(
        position,
        plain,
        speculative,
        gap=best - second,
        distance=best - min(values),
        bound=rounding_bound(dtype, largest),
        margin=values[0] - values[1],
    )
