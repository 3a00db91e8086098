"""Recording acceptance: one answer, its streams at every token, and where the truth stood in each tree.

The answer is generated, then read again in chunks as a chain whose nodes all have their streams
(the inline pass of `step.py`). Every node's streams draft a tree of 64 nodes, and the answer's
own next tokens are looked up in it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_specstream.cache import KVCache
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.decode import StreamDecoder
from mlx_specstream.result import StepResult
from mlx_specstream.sampling import TokenChooser
from mlx_specstream.streams import Streams
from mlx_specstream.tree import DraftTree, build, chain

from .acceptance import RECORDED_ROWS, AnswerTrace, Position

CHUNK = 16  # tokens per pass
KEPT_CHANCES = 32  # of the tree's nodes


def record_answer(
    streams: Streams,
    prompt: Sequence[int],
    max_tokens: int,
    stop: Collection[int],
    task: str = "chat",
) -> AnswerTrace:
    """Answer `prompt` greedily, up to a token of `stop`, and return the answer's trace.

    Raises:
        ModelError: the model computed NaN.
    """
    text = _answer(streams, prompt, max_tokens, stop)
    return AnswerTrace(tuple(positions_of(streams, prompt, text)), task)


def positions_of(streams: Streams, prompt: Sequence[int], text: Sequence[int]) -> list[Position]:
    """Return the records of every token of `text`, which follows `prompt`."""
    stepper = replace(
        StreamDecoder(streams, DecodeConfig(), TokenChooser()).stepper,
        tree=TreeSpec("best", rows=RECORDED_ROWS),
        inline=True,
    )
    cache = KVCache(streams.backbone.num_layers)
    StreamDecoder(streams, DecodeConfig(), TokenChooser()).prefill(prompt[:-1], cache)
    before = [prompt[-1], *text[:-1]]
    positions: list[Position] = []
    for first in range(0, len(text), CHUNK):
        nodes = before[first : first + CHUNK]
        verified = stepper.verify(chain(mx.array(nodes)), cache)
        assert verified.streams is not None
        trees = []
        for place in range(len(nodes)):
            states = verified.streams[:, place]
            root = mx.array([text[first + place]])
            proposer = stepper.candidates(states)
            trees.append(build(root, stepper.tree, streams.num_streams, proposer))
        mx.eval([[*tree.arrays, tree.scores] for tree in trees])
        cache.advance(len(nodes))
        for place, tree in enumerate(trees):
            positions.append(looked_up(tree, text[first + place + 1 :]))
    return positions


def looked_up(tree: DraftTree, following: Sequence[int]) -> Position:
    """Return where the tokens `following` the root stand in a tree with scores."""
    assert tree.scores is not None
    tokens, parents = np.array(tree.tokens), np.array(tree.parents)
    scores = np.array(tree.scores)
    orders, ranks, node = [], [], 0
    for token in following[: tree.depth]:
        children = np.flatnonzero(parents == node)
        children = children[children > 0]
        right = children[tokens[children] == token]
        if not len(right):
            break
        node = int(right[0])
        orders.append(int((scores > scores[node]).sum()))
        ranks.append(1 + int((scores[children] > scores[node]).sum()))
    chances = np.exp(np.sort(scores)[::-1][:KEPT_CHANCES])
    return Position(tuple(orders), tuple(ranks), chances=tuple(map(float, chances)))


def _answer(
    streams: Streams, prompt: Sequence[int], max_tokens: int, stop: Collection[int]
) -> list[int]:
    """Return the greedy answer with the token that ends it."""
    decoder = StreamDecoder(streams, DecodeConfig(), TokenChooser())
    cache = KVCache(streams.backbone.num_layers)
    decoder.prefill(prompt[:-1], cache)
    text: list[int] = []

    def more(result: StepResult) -> bool:
        for token in result.tokens:
            text.append(token)
            if token in stop or len(text) >= max_tokens:
                return False
        return True

    for _ in decoder.steps(prompt[-1], cache, more):
        pass
    return text
