"""Ways to draw tokens that give the same token wherever they are asked at the same place.

Draws are made of Gumbel noise with a key per position: the likeliest token of the noisy logits is
a sample, and the same one for plain and for speculative decoding. A processor is told the text so
far, whose length is the position; mlx-lm's own penalties and filters go before the noise.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx_lm import sample_utils

from tests.support.exactness.draw import Scene

Processor = Callable[[mx.array, mx.array], mx.array]


def processors_for(scene: Scene, turn: int, vocab_size: int) -> list[Processor]:
    """Return the logits processors of a turn."""
    seed = scene.seed + turn
    if scene.choice == "likeliest":
        return []
    if scene.choice == "drawn":
        return [noise(seed)]
    if scene.choice == "filtered":
        return [keep_likely(0.8), noise(seed)]
    if scene.choice == "penalised":
        made: list[Processor] = sample_utils.make_logits_processors(
            repetition_penalty=1.3, repetition_context_size=7
        )
        return made
    bias = {scene.seed % vocab_size: 2.0, (scene.seed // 7) % vocab_size: -1.5}
    biased: list[Processor] = sample_utils.make_logits_processors(logit_bias=bias)
    return [*biased, noise(seed)]


def noise(seed: int) -> Processor:
    """Return a processor that adds Gumbel noise, keyed by the seed and the text's length."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        key = mx.random.key((seed * 4099 + tokens.shape[0]) % 2**32)
        return logits.astype(mx.float32) + mx.random.gumbel(logits.shape, key=key)

    return process


def keep_likely(p: float) -> Processor:
    """Return a processor that leaves the tokens that mlx-lm's top-p filter leaves."""

    def process(_: mx.array, logits: mx.array) -> mx.array:
        log_probs = logits.astype(mx.float32)
        log_probs = log_probs - mx.logsumexp(log_probs, axis=-1, keepdims=True)
        kept: mx.array = sample_utils.apply_top_p(log_probs, p)
        return kept

    return process
