"""A long generation: does memory stay flat beyond the KV cache, which must grow?

A small random model with a real tokenizer generates tens of thousands of tokens through the whole
of `stream_generate`; when an answer ends, the next one goes on in the same cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.doctor.sizes import Shape
from mlx_specstream.generation.generate import stream_generate
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.model.cache import KVCache
from tests.support.random_models import random_model, random_streams

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ALLOWED_BYTES = 4_000_000
"""How much memory beyond the KV cache may grow between the first fifth of a run and its end."""


def small_model(vocab: int) -> StreamModel:
    """Return a random model of four layers with streams, for a tokenizer of that many tokens."""
    shape = Shape("long", 4, 128, 256, 4, 2, 32, vocab, True)
    plain = StreamModel.plain(random_model(shape, 32))
    streams = random_streams(plain.backbone, 4, 2, conditioned=True)
    return StreamModel(plain.model, plain.backbone, streams, "random", "random")


def long_generation(
    model: StreamModel, tokenizer: TokenizerWrapper, tokens: int, tree: str = "8"
) -> Iterator[dict[str, Any]]:
    """Generate and yield twenty samples of memory, in bytes: MLX's, the KV cache's, the process's."""
    config = DecodeConfig(TreeSpec.parse(tree))
    cache = KVCache(model.backbone.num_layers)
    prompt, done, every = [1, 2, 3], 0, max(1, tokens // 20)
    started, sampled = time.perf_counter(), 0.0
    while done < tokens:
        for response in stream_generate(
            model, tokenizer, prompt, tokens - done, prompt_cache=cache, config=config
        ):
            done += 1
            prompt = [response.token]
            if done % every == 0:
                elapsed = time.perf_counter() - started
                yield {
                    "x": done,
                    "series": f"tree {tree}",
                    "active_bytes": mx.get_active_memory(),
                    "kept_bytes": mx.get_cache_memory(),
                    "kv_bytes": sum(array.nbytes for array in cache.arrays),
                    "process_bytes": process_bytes(),
                    "token_ms": 1e3 * (elapsed - sampled) / every,
                }
                sampled = elapsed


def growth_bytes(samples: list[dict[str, Any]]) -> int:
    """Return how much more MLX holds beyond the KV cache at the end than after the first fifth."""
    beyond = [sample["active_bytes"] - sample["kv_bytes"] for sample in samples]
    fifth = max(1, len(beyond) // 5)
    return int(max(beyond[-fifth:]) - max(beyond[:fifth]))


def process_bytes() -> int:
    """Return the memory of this process, 0 where it cannot be told."""
    try:
        if sys.platform == "darwin":
            words = ["/bin/ps", "-o", "rss=", "-p", str(os.getpid())]
            done = subprocess.run(words, capture_output=True, text=True, timeout=5, check=True)
            return 1024 * int(done.stdout)
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return 0
