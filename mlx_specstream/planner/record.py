"""Recording acceptance: one answer, its streams at every token, and where the truth stood in each tree.

The answer is generated, then read again in chunks as a chain whose nodes all have their streams
(the inline pass of `step.py`). Every node's streams draft a tree of 64 nodes, and the answer's
own next tokens are looked up in it. If the streams hold a pruner, all trees of a chunk go through
the lower layers together, as branches of the true text, to learn what an early exit would keep.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..config import DecodeConfig, PruneSpec, TreeSpec
from ..model.cache import KVCache
from ..speculation.drafters import StreamDrafter
from ..speculation.drafting import StreamDecoder
from ..speculation.prune import path_scores
from ..speculation.result import MaxTokens
from ..speculation.sampling import TokenSampler
from ..speculation.streams import Streams
from ..speculation.tree import DraftTree, best_nodes, build, chain, end_chances, select
from .acceptance import RECORDED_ROWS
from .settings import INLINE_NODES, INLINE_PRUNED, PRUNED
from .trace import AnswerTrace, Position

CHUNK = 16  # tokens per pass
KEPT_CHANCES = 32  # of the tree's nodes
PRUNED_ROWS = sorted({rows for rows, _ in (*PRUNED, *INLINE_PRUNED)})
END_ROWS = sorted({rows for rows, _ in INLINE_NODES})


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
    prune = PruneSpec(1) if streams.config.pruner_rank else None
    decoder = StreamDecoder(streams, DecodeConfig(prune=prune), TokenSampler())
    assert isinstance(decoder.drafter, StreamDrafter)
    drafter = replace(decoder.drafter, inline=True, prune=None)
    spec = TreeSpec("best", rows=RECORDED_ROWS)
    cache = KVCache(streams.backbone.num_layers)
    decoder.prefill(prompt[:-1], cache)
    before = [prompt[-1], *text[:-1]]
    positions: list[Position] = []
    for first in range(0, len(text), CHUNK):
        nodes = before[first : first + CHUNK]
        said = mx.array(list(text[first : first + len(nodes)]))
        verified = drafter.verify(chain(mx.array(nodes)), cache, said)
        assert verified.streams is not None
        trees = []
        for place in range(len(nodes)):
            states = verified.streams[:, place]
            root = mx.array([text[first + place]])
            proposer = drafter.candidates(states, spec.branching)
            last = mx.array(nodes[place])
            trees.append(build(root, spec, streams.num_streams, proposer, last))
        mx.eval([[*tree.arrays, tree.scores] for tree in trees])
        exits = _exit_scores(drafter, nodes[0], trees, cache)
        cache.advance(len(nodes))
        for place, tree in enumerate(trees):
            following = text[first + place + 1 :]
            pruned = {
                rows: _orders(small, scores, following)[1:]
                for rows, (small, scores) in (exits[place] if exits else {}).items()
            }
            ends = {
                rows: _orders(small, end_chances(small), following)
                for rows, small in ((rows, _best(tree, rows)[0]) for rows in END_ROWS)
            }
            positions.append(replace(looked_up(tree, following), pruned=pruned, ends=ends))
    return positions


def looked_up(tree: DraftTree, following: Sequence[int]) -> Position:
    """Return where the tokens `following` the root stand in a tree with scores."""
    assert tree.scores is not None
    parents, scores = np.array(tree.parents), np.array(tree.scores)
    path = path_of(tree, following)
    orders = [int((scores > scores[node]).sum()) for node in path[1:]]
    ranks = [
        1 + int((scores[1:][parents[1:] == parents[node]] > scores[node]).sum())
        for node in path[1:]
    ]
    chances = np.exp(np.sort(scores)[::-1][:KEPT_CHANCES])
    return Position(tuple(orders), tuple(ranks), chances=tuple(map(float, chances)))


def path_of(tree: DraftTree, following: Sequence[int]) -> list[int]:
    """Return the tree's nodes along the tokens `following` the root, the root first."""
    tokens, parents = np.array(tree.tokens), np.array(tree.parents)
    path = [0]
    for token in following[: tree.depth]:
        right = np.flatnonzero((parents == path[-1]) & (tokens == token))
        right = right[right > 0]
        if not len(right):
            break
        path.append(int(right[0]))
    return path


def _orders(tree: DraftTree, scores: mx.array, following: Sequence[int]) -> tuple[int, ...]:
    """Return how many nodes have higher scores than those along `following`, the root first."""
    found = np.array(scores)
    return tuple(int((found > found[node]).sum()) for node in path_of(tree, following))


def _best(tree: DraftTree, rows: int) -> tuple[DraftTree, mx.array]:
    """Return the best-first tree of so many rows in a larger one, and its nodes there."""
    assert tree.scores is not None
    kept = best_nodes(tree.scores, min(rows, tree.num_nodes))
    return select(tree, kept), kept


def _exit_scores(
    drafter: StreamDrafter, token: int, trees: Sequence[DraftTree], cache: KVCache
) -> list[dict[int, tuple[DraftTree, mx.array]]]:
    """Return the best-first trees of `PRUNED_ROWS` at each place, with their early-exit scores.

    The trees' roots are the tokens after `token`, which follows the committed text, in a row;
    their nodes branch off there, all in one pass. Empty without a pruner.
    """
    if drafter.pruner is None:
        return []
    n = len(trees)
    widest = [_best(tree, PRUNED_ROWS[-1])[0] for tree in trees]
    tokens = [mx.array([token]), *(tree.tokens[:1] for tree in widest)]
    parents = [mx.maximum(mx.arange(n + 1, dtype=mx.int32) - 1, 0)]
    depths = [mx.arange(n + 1, dtype=mx.int32)]
    rows, size = [], n + 1  # of each tree's nodes in the forest
    for place, tree in enumerate(widest):
        own = mx.arange(tree.num_nodes, dtype=mx.int32) + size - 1
        rows.append(mx.where(mx.arange(tree.num_nodes) == 0, place + 1, own))
        tokens.append(tree.tokens[1:])
        parents.append(mx.take(rows[-1], tree.parents[1:]))
        depths.append(tree.depths[1:] + place + 1)
        size += tree.num_nodes - 1
    forest = DraftTree(
        mx.concatenate(tokens),
        mx.concatenate(parents),
        mx.concatenate(depths),
        depth=n + max(tree.depth for tree in widest),
    )
    hidden = drafter.lower(forest, cache)
    found = []
    for tree, own in zip(widest, rows, strict=True):
        at: dict[int, tuple[DraftTree, mx.array]] = {}
        for wide in PRUNED_ROWS:
            small, kept = _best(tree, wide)
            main = mx.take(hidden, mx.take(own, kept), axis=1)
            log_probs = drafter.pruner.child_log_probs(drafter.streams.backbone, small, main)
            at[wide] = small, path_scores(small, log_probs)
        found.append(at)
    mx.eval([scores for at in found for _, scores in at.values()])
    return found


def _answer(
    streams: Streams, prompt: Sequence[int], max_tokens: int, stop: Collection[int]
) -> list[int]:
    """Return the greedy answer with the token that ends it."""
    decoder = StreamDecoder(streams, DecodeConfig(), TokenSampler())
    cache = KVCache(streams.backbone.num_layers)
    decoder.prefill(prompt[:-1], cache)
    criteria = MaxTokens(max_tokens, stop)
    for _ in decoder.steps(prompt[-1], cache, criteria):
        pass
    return criteria.tokens
