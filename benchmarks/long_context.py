"""A long text through a small cache: plain decoding by mlx-lm, and speculation, token for token.

    python -m benchmarks.long_context --max-kv-size 1024
    python -m benchmarks.long_context --kv-bits 4

On a slow machine `--reference FILE` keeps what mlx-lm said, for a second call to compare with.

Both sides prefill the same text in mlx-lm's chunks and decode with the same kind of cache. mlx-lm
gets its cache objects made, for its own option max_kv_size does not reach models that make their
caches themselves.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_specstream.errors import OptionError
from mlx_specstream.exit_status import exit_status
from mlx_specstream.generation.decode_options import (
    add_cache_options,
    add_decode_options,
    add_model_options,
    cache_config,
    decode_config,
    load_options,
)
from mlx_specstream.weights.files import atomic_file

if TYPE_CHECKING:
    from mlx_specstream.config import CacheConfig
    from mlx_specstream.loading.load import StreamModel
    from mlx_specstream.model.cache import KVCache


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_context",
        description="Compare speculation with mlx-lm's decoding behind a long text.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--context", type=int, default=6000, help="tokens of text (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=100, help="tokens to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        help="safetensors file of mlx-lm's answer: written and no more, or read if it is there",
    )
    add_cache_options(parser)
    add_decode_options(parser)
    parser.set_defaults(tree="5")
    return parser


def main(argv: list[str]) -> int:
    """Decode both ways and compare; 1 if the tokens differ by more than a near-tie."""
    arguments = build_parser().parse_args(argv)
    caching, decoding = cache_config(arguments), decode_config(arguments)
    if arguments.context < 2 or arguments.max_tokens < 1:
        raise OptionError("--context must be at least 2 and --max-tokens at least 1.")

    from mlx_specstream import load
    from mlx_specstream.errors import StreamsError
    from mlx_specstream.speculation.drafting import StreamDecoder
    from mlx_specstream.speculation.result import MaxTokens
    from mlx_specstream.speculation.sampling import TokenSampler
    from mlx_specstream.verify import rounding_bound

    model, tokenizer = load(arguments.model, **load_options(arguments))
    if model.streams is None:
        raise StreamsError("there are no streams for this model; name them with --streams.")
    text = files("mlx_specstream.bench").joinpath("prompts.jsonl").read_text(encoding="utf-8")
    ids = list(tokenizer.encode(text))
    ids = (ids * (arguments.context // len(ids) + 1))[: arguments.context]
    cache = model.backbone.new_cache(caching)

    if arguments.reference is not None and arguments.reference.exists():
        plain, log_probs = read_reference(arguments.reference, ids)
    else:
        plain, log_probs = mlx_lm_answer(model, ids, arguments.max_tokens, cache, caching)
        if arguments.reference is not None:
            write_reference(arguments.reference, ids, plain, log_probs)
            return 0

    started = time.perf_counter()
    decoder = StreamDecoder(model.streams, decoding, TokenSampler(None, (), list(ids)))
    decoder.prefill(ids[:-1], cache)
    criteria = MaxTokens(len(plain))
    accepted = [result.accepted for result in decoder.steps(ids[-1], cache, criteria)]
    found = criteria.tokens
    print(
        f"speculation: {len(accepted)} passes, {sum(accepted)} accepted drafts, "
        f"{time.perf_counter() - started:.0f} s; the cache takes {cache.nbytes / 1e6:.0f} MB"
    )
    for place, (ours, theirs) in enumerate(zip(found, plain, strict=False)):
        if ours != theirs:
            values = log_probs[place].astype(mx.float32)
            worse = mx.minimum(values[ours], values[theirs])
            gap = float((mx.max(values) - worse).item())  # type: ignore[arg-type]
            bound = rounding_bound(model.backbone.dtype, float(mx.abs(values).max().item()))  # type: ignore[arg-type]
            near = gap <= bound
            verdict = "a near-tie" if near else "a mismatch"
            print(f"token {place}: {ours}, mlx-lm {theirs}, gap {gap:.3g}: {verdict}")
            return 0 if near else 1
    print(f"identical: {len(plain)} tokens behind {len(ids)}")
    return 0


def mlx_lm_answer(
    model: StreamModel, ids: list[int], max_tokens: int, cache: KVCache, caching: CacheConfig
) -> tuple[list[int], list[mx.array]]:
    """Return mlx-lm's tokens behind `ids`, and the log-probabilities (V,) of each place.

    cache: an empty one, of the kind that mlx-lm is to use.
    """
    from mlx_lm.generate import generate_step

    from mlx_specstream.model.cache import as_mlx_lm

    started = time.perf_counter()
    tokens, log_probs = [], []
    for token, values in generate_step(
        mx.array(ids),
        model.model,
        max_tokens=max_tokens,
        prompt_cache=as_mlx_lm(cache),
        kv_bits=caching.kv_bits,
        kv_group_size=caching.kv_group_size,
        quantized_kv_start=caching.quantized_kv_start,
    ):
        tokens.append(int(token))
        log_probs.append(values)
    print(f"mlx-lm: {len(tokens)} tokens, {time.perf_counter() - started:.0f} s", flush=True)
    return tokens, log_probs


def write_reference(
    path: Path, ids: list[int], tokens: list[int], log_probs: list[mx.array]
) -> None:
    """Write mlx-lm's answer."""
    arrays = {
        "prompt": mx.array(ids),
        "tokens": mx.array(tokens),
        "log_probs": mx.stack(log_probs).astype(mx.float32),
    }
    with atomic_file(path, if_exists="replace") as partial:
        # mlx adds the ending to a name that has none.
        written = partial.with_name(partial.name + ".safetensors")
        mx.save_safetensors(str(written), arrays)
        written.replace(partial)


def read_reference(path: Path, ids: list[int]) -> tuple[list[int], list[mx.array]]:
    """Return what `write_reference` wrote.

    Raises:
        OptionError: it is another file, or behind another text.
    """
    try:
        arrays = mx.load(str(path), format="safetensors")
        assert isinstance(arrays, dict)
        prompt, tokens = (np.array(arrays[name]).tolist() for name in ("prompt", "tokens"))
        log_probs = arrays["log_probs"]
    except (RuntimeError, KeyError) as error:
        raise OptionError(f"--reference {path} holds no answer; name another file.") from error
    if prompt != ids:
        raise OptionError(f"--reference {path} is behind another text; name another file.")
    return tokens, list(log_probs)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), "long_context"))
