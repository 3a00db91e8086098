"""Prefill: the prompt enters the cache in chunks, main stream only, without the LM head.

The last prompt token stays outside: it is the root of the first step, where streams start too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from .cache import KVCache

PREFILL_CHUNK = 2048


def prefill(
    forward: Callable[[mx.array, KVCache], mx.array],
    tokens: Sequence[int],
    cache: KVCache,
    on_progress: Callable[[int, int], None] | None,
    chunk: int,
) -> None:
    """Run `tokens` through `forward` in chunks and commit them; `on_progress(done, total)`."""
    for done in prefill_chunks(forward, tokens, cache, chunk):
        if on_progress is not None:
            on_progress(done, len(tokens))


def prefill_chunks(
    forward: Callable[[mx.array, KVCache], mx.array],
    tokens: Sequence[int],
    cache: KVCache,
    chunk: int,
) -> Iterator[int]:
    """Run `tokens` through `forward`, a chunk at a time; yield how many are committed.

    Chunks are mlx-lm's. Where it matters, a first token that an earlier answer ended with gets a
    pass of its own, as it would have had if decoding had gone on.
    """
    done = 0
    while done < len(tokens):
        rows = 1 if cache.next_is_generated and cache.depends_on_passes else chunk
        part = mx.array(list(tokens[done : done + rows]), dtype=mx.int32)
        forward(part, cache)
        cache.advance(part.shape[0])
        mx.eval(cache.arrays)
        done += part.shape[0]
        yield done
