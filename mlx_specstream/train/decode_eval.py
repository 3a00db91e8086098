"""What training gave, in the currency of decoding: tokens per step over held-out prompts.

Greedy, as a chain of all streams and as the best 16 rows. Plain decoding gives 1.00.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..config import DecodeConfig, StreamConfig, TreeSpec
from ..model.backbone import Backbone
from ..model.cache import KVCache
from ..speculation.drafting import StreamDecoder
from ..speculation.result import MaxTokens
from ..speculation.sampling import TokenSampler
from ..speculation.streams import Streams
from .loss import Tensors

TREES = {"chain": TreeSpec("chain", branching=1), "16 rows": TreeSpec("best", rows=16)}


def decoded_tokens_per_step(
    backbone: Backbone,
    config: StreamConfig,
    tensors: Tensors,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Collection[int],
) -> dict[str, float]:
    """Decode every prompt with each tree; return tokens per step by the tree's name."""
    streams = Streams(backbone, config, tensors)
    figures = {}
    for name, tree in TREES.items():
        steps = tokens = 0
        for prompt in prompts:
            counts = _decode(streams, tree, prompt, max_tokens, stop)
            steps, tokens = steps + len(counts), tokens + sum(counts)
        if steps:
            figures[name] = round(tokens / steps, 3)
    return figures


def _decode(
    streams: Streams, tree: TreeSpec, prompt: Sequence[int], max_tokens: int, stop: Collection[int]
) -> list[int]:
    """Return how many tokens each step of one answer emitted, up to its end."""
    decoder = StreamDecoder(streams, DecodeConfig(tree=tree), TokenSampler())
    cache = KVCache(streams.backbone.num_layers)
    decoder.prefill(prompt[:-1], cache)
    emitted: list[int] = []

    for result in decoder.steps(prompt[-1], cache, MaxTokens(max_tokens, stop)):
        ends = [i for i, token in enumerate(result.tokens) if token in stop]
        emitted.append(ends[0] + 1 if ends else len(result.tokens))
    return emitted
