"""Prefill: the prompt enters the cache in chunks, main stream only, without the LM head.

The last prompt token stays outside: it is the root of the first step, where streams start too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..machine import ranks
from .cache import KVCache

PREFILL_CHUNK = 2048
CHUNK_S = 0.3  # what a chunk may take while a person waits and may want to stop
FEWEST_ROWS = 16


@dataclass
class PacedChunks:
    """Sizes of chunks that take about `CHUNK_S` each here, `longest` tokens at most.

    One object may pace many prompts. Where rows depend on the passes that made them, every chunk
    has `longest` tokens: how busy a machine is must not change an answer.
    """

    longest: int = 512
    size: int = FEWEST_ROWS

    def for_cache(self, cache: KVCache) -> int:
        """Return how many tokens the next chunk has."""
        return self.longest if cache.depends_on_passes else min(self.size, self.longest)

    def took(self, rows: int, seconds: float) -> None:
        """Note what a chunk took; the next size is a power of two, at most four times as many."""
        wanted = min(4.0 * rows, rows * CHUNK_S / max(seconds, 1e-9))
        self.size = max(FEWEST_ROWS, 1 << (int(wanted).bit_length() - 1 if wanted >= 1 else 0))


ChunkSize = int | PacedChunks


def prefill(
    forward: Callable[[mx.array, KVCache], mx.array],
    tokens: Sequence[int],
    cache: KVCache,
    on_progress: Callable[[int, int], None] | None,
    chunk: ChunkSize,
) -> None:
    """Run `tokens` through `forward` in chunks and commit them; `on_progress(done, total)`."""
    for done in prefill_chunks(forward, tokens, cache, chunk):
        if on_progress is not None:
            on_progress(done, len(tokens))


def prefill_chunks(
    forward: Callable[[mx.array, KVCache], mx.array],
    tokens: Sequence[int],
    cache: KVCache,
    chunk: ChunkSize,
) -> Iterator[int]:
    """Run `tokens` through `forward`, a chunk at a time; yield how many are committed.

    Chunks are mlx-lm's. Where it matters, a first token that an earlier answer ended with gets a
    pass of its own, as it would have had if decoding had gone on.
    """
    done = 0
    while done < len(tokens):
        rows = chunk if isinstance(chunk, int) else chunk.for_cache(cache)
        if cache.next_is_generated and cache.depends_on_passes:
            rows = 1
        started = time.perf_counter()
        part = mx.array(list(tokens[done : done + rows]), dtype=mx.int32)
        hidden = forward(part, cache)
        cache.advance(part.shape[0])
        # Among processes the hidden states are messages, which every process must see through.
        mx.eval(cache.arrays, hidden if ranks.group() else [])
        if isinstance(chunk, PacedChunks) and part.shape[0] == rows:
            chunk.took(rows, time.perf_counter() - started)
        done += part.shape[0]
        yield done
