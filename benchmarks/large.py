"""A model of 8 billion weights in 4 bits on this machine: memory, bytes read per pass, a long prompt.

    python -m benchmarks.large make FOLDER               random weights, 4.5 GB; no download
    python -m benchmarks.large load FOLDER [--streams]   time and peak of loading
    python -m benchmarks.large decode FOLDER --prompt 512 --context 8192

Streams have the shape that `specstream adopt` gives them, untrained: a step costs the same. Bytes
are counted where layers compute, in passes that run.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from benchmarks.pages import set_section
from benchmarks.random_weights import write_random_model
from mlx_specstream.commands.adoption.plan import train_options
from mlx_specstream.config import DecodeConfig
from mlx_specstream.doctor.sizes import TYPICAL, Shape
from mlx_specstream.exit_status import exit_status
from mlx_specstream.loading.load import StreamModel, load
from mlx_specstream.machine import Machine
from mlx_specstream.model.cache import KVCache
from mlx_specstream.model.families.embed_and_head import EmbedAndHead
from mlx_specstream.speculation.drafting import StreamDecoder
from mlx_specstream.speculation.plain import PlainDecoder
from mlx_specstream.speculation.result import MaxTokens
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.train.initialise import untrained
from mlx_specstream.weights.checkpoint import save_streams
from mlx_specstream.weights.fingerprint import base_dims, fingerprint
from tests.support.random_models import filled_cache

SHAPE = next(shape for shape in TYPICAL if shape.name == "Llama-3.1-8B")
CHUNK = 512
TITLE, BEFORE = "Eight billion weights in 4 bits", "Anatomy of a step"
WEIGHTS = ("weight", "scales", "biases")
DTYPES = {"float16": mx.float16, "float32": mx.float32}


def make(folder: Path, shape: Shape, dtype: mx.Dtype = mx.float16) -> None:
    """Write the model and, in `streams`, its streams in 16 bits."""
    write_random_model(folder, shape, dtype)
    model, _ = load(str(folder), streams=None, lazy=True)
    options = train_options(model, "lossless")
    dims = base_dims(model.model)
    modules = dims.common_modules(options.msa_layers(dims.num_layers))
    config = options.stream_config(dims.num_layers, modules)
    tensors = untrained(model.backbone, config, rms=1.0, seed=0)
    halves = {name: value.astype(mx.float16) for name, value in tensors.items()}
    own = fingerprint(model.model)
    save_streams(folder / "streams", config, halves, base_model=None, fingerprint=own)


def loaded(folder: Path, streams: bool) -> tuple[dict[str, Any], StreamModel]:
    """Load the model, and return what that took, in bytes and seconds."""
    before, begun = _resident_peak(), time.perf_counter()
    model, _ = load(str(folder), streams=folder / "streams" if streams else None)
    base = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    own = sum(path.stat().st_size for path in (folder / "streams").glob("*.safetensors"))
    found = {
        "base_bytes": base,
        "streams_bytes": own,
        "streams_share": own / base,
        "load_s": time.perf_counter() - begun,
        "resident_before": before,
        "resident_peak": _resident_peak(),
        "mlx_active": mx.get_active_memory(),
        "mlx_peak": mx.get_peak_memory(),
    }
    return found, model


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Count the bytes of weights that the layers of passes read, tokens' embedding rows left out."""
    read = 0
    linear, product = nn.QuantizedLinear.__call__, EmbedAndHead.product

    def note(module: nn.Module) -> None:
        nonlocal read
        read += sum(module[name].nbytes for name in WEIGHTS if name in module)

    def noted_linear(module: nn.QuantizedLinear, x: mx.array) -> mx.array:
        note(module)
        return linear(module, x)

    def noted_product(parts: EmbedAndHead, normed: mx.array) -> mx.array:
        note(parts.head)  # which it calls by what it has found before
        return product(parts, normed)

    nn.QuantizedLinear.__call__ = noted_linear  # type: ignore[method-assign]
    EmbedAndHead.product = noted_product  # type: ignore[method-assign, assignment]
    try:
        yield lambda: read
    finally:
        nn.QuantizedLinear.__call__ = linear  # type: ignore[method-assign]
        EmbedAndHead.product = product  # type: ignore[method-assign]


def dequantise_rows(least: int) -> None:
    """Let quantised layers take so many rows or more through their dequantised matrix.

    MLX's own product dequantises every weight once for every row on a CPU. No more than one layer's
    matrix is there at a time.
    """
    own = nn.QuantizedLinear.__call__

    def run(module: nn.QuantizedLinear, x: mx.array) -> mx.array:
        if x.shape[-2] < least:
            return own(module, x)
        weight, scales, biases = (module[name] for name in WEIGHTS)
        matrix = mx.dequantize(weight, scales, biases, module.group_size, module.bits)
        result = x @ matrix.astype(x.dtype).T
        mx.eval(result)
        return result

    nn.QuantizedLinear.__call__ = run  # type: ignore[method-assign]


def read_prompt(model: StreamModel, tokens: int) -> dict[str, Any]:
    """Read a prompt in chunks, telling how far it is."""
    cache = model.backbone.new_cache()
    prompt = [(7 * i * i + 3 * i) % 997 for i in range(tokens)]
    begun = time.perf_counter()
    mx.reset_peak_memory()
    for done in model.prefill(prompt, cache, CHUNK):
        seconds = time.perf_counter() - begun
        print(f"{done} tokens of the prompt, {seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        "prompt_tokens": tokens,
        "prompt_s": time.perf_counter() - begun,
        "cache_bytes": cache.nbytes,
        "mlx_peak": mx.get_peak_memory(),
        "resident_peak": _resident_peak(),
    }


def decoded(model: StreamModel, cache: KVCache, tree: str, passes: int) -> dict[str, Any]:
    """Decode so many passes behind a cache, plainly and with streams; the bytes of one of each."""
    assert model.streams is not None
    length = cache.length
    decoders = {
        "plain": PlainDecoder(model.backbone, TokenSampler()),
        tree: StreamDecoder(model.streams, DecodeConfig.parse(tree), TokenSampler()),
    }
    found: dict[str, Any] = {"context": length, "cache_bytes": cache.nbytes}
    for name, decoder in decoders.items():
        mx.reset_peak_memory()
        cache.rewind(length)
        with counted() as read:
            steps = iter(decoder.steps(1, cache, MaxTokens()))
            before = [0]
            begun = time.perf_counter()
            for _ in range(passes):
                next(steps)
                mx.synchronize()
                before.append(read())
            seconds = time.perf_counter() - begun
        # The first pass drafts from the root alone, and plain decoding runs one pass ahead.
        each = before[-1] - before[-2]
        found[name] = {
            "weight_bytes": each,
            "pass_s": seconds / passes,
            "mlx_peak": mx.get_peak_memory(),
            "resident_peak": _resident_peak(),
        }
    return found


def section(found: dict[str, Any]) -> str:
    """Return what was found as Markdown."""
    context, prompt = found["context"], found["prompt"]
    tree = next(name for name in context if name not in ("plain", "context", "cache_bytes"))
    plain, step = context["plain"], context[tree]

    def gb(number: float) -> str:
        return f"{number / 1e9:.2f} GB"

    return f"""\
`python -m benchmarks.large` makes a {SHAPE.name} of random 4-bit weights, {gb(found["base_bytes"])}, and streams as
`specstream adopt` makes them, {found["streams_bytes"] / 1e6:.0f} MB or {found["streams_share"]:.1%} of it.
Measured on {found["machine"]}, {found["date"]}.

| | |
|---|---|
| memory after loading, streams and probe included | {gb(found["mlx_active"])}; at the peak {gb(found["mlx_peak"])} \
(process {gb(found["resident_peak"])}): nothing is there twice |
| weights read per token, decoding plainly | {gb(plain["weight_bytes"])} |
| weights read per step of a {tree} | {gb(step["weight_bytes"])}, the streams' layers a second time |
| peak behind {context["context"]:,} tokens | {gb(plain["mlx_peak"])} plainly, {gb(step["mlx_peak"])} with streams; \
the KV cache holds {gb(context["cache_bytes"])} |
| a prompt of {prompt["prompt_tokens"]:,} tokens, in chunks of {CHUNK} | peak {gb(prompt["mlx_peak"])}, \
{prompt["prompt_s"]:.0f} s |
"""


def _resident_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def build_parser() -> argparse.ArgumentParser:
    """Return the options of `python -m benchmarks.large`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large")
    parser.add_argument("verb", choices=("make", "load", "decode"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="make: of the scales")
    parser.add_argument("--streams", action="store_true", help="load: with the streams")
    parser.add_argument("--prompt", type=int, default=0, help="decode: tokens of a prompt to read")
    parser.add_argument("--context", type=int, default=0, help="decode: behind so many random rows")
    parser.add_argument("--tree", default="chain", help="decode: what to verify")
    parser.add_argument("--passes", type=int, default=3, help="decode: of each kind")
    parser.add_argument(
        "--dequantise", type=int, default=0, help="decode: passes of so many rows or more"
    )
    parser.add_argument("--page", type=Path, help="decode: put a section into this page")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the first word says and print what was found as JSON."""
    options = build_parser().parse_args(argv)
    if options.verb == "make":
        make(options.folder, SHAPE, DTYPES[options.dtype])
        return 0
    found, model = loaded(options.folder, options.streams or options.verb == "decode")
    if options.dequantise:
        dequantise_rows(options.dequantise)
    if options.verb == "decode" and options.prompt:
        found["prompt"] = read_prompt(model, options.prompt)
    if options.verb == "decode" and options.context:
        cache = filled_cache(model.backbone, options.context)
        found["context"] = decoded(model, cache, options.tree, options.passes)
    machine = Machine.read()
    found |= {"machine": f"{machine.chip}, MLX {machine.mlx}", "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(found, indent=1))
    if options.page is not None:
        set_section(options.page, TITLE, section(found), BEFORE)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, "large"))
