"""How many kernels one step starts, beside a plain token of ours and of mlx-lm: counted in its graph.

A GPU takes some microseconds to start each kernel, whatever it computes, so a small model's step costs
about what it starts. The graph of a step is drawn, not computed: the count is the same on every
machine where MLX compiles (its CPU build needs a C++ compiler for that). Views (slices, transposes,
reshapes) start nothing. Norms, rotations and attention are one kernel each on a GPU, where MLX draws
them as many on the CPU; so one stands for them here.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_specstream.config import DecodeConfig
from mlx_specstream.errors import StreamsError
from mlx_specstream.exit_status import exit_status
from mlx_specstream.loading.load import load
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.drafting import StreamDecoder
from mlx_specstream.speculation.plain import PlainDecoder
from mlx_specstream.speculation.sampling import TokenSampler
from mlx_specstream.speculation.step import Step
from mlx_specstream.speculation.streams import Streams

CONTEXT = 100
FUSED = {
    "rms_norm": "Sinh",
    "layer_norm": "Cosh",
    "rope": "ArcSinh",
    "scaled_dot_product_attention": "ArcTan",
}
"""What a fused operation is drawn as while kernels are counted: one that no decoder computes."""
VIEWS = {
    *("Broadcast", "BroadcastAxes", "ExpandDims", "Squeeze", "Transpose", "Slice", "Reshape"),
    *("Flatten", "Unflatten", "AsStrided", "View", "Split", "StopGradient", "Contiguous"),
    *("Depends", "NumberOfElements"),
}
_NODE = re.compile(r'\[label ="(\w+)", shape=rectangle\]')


@contextmanager
def fused_as_one() -> Iterator[list[mx.array]]:
    """Draw every fused operation as one node; yields a list of the inputs that it leaves out."""
    inputs: list[mx.array] = []
    originals = {name: getattr(mx.fast, name) for name in FUSED}
    nodes = {"Sinh": mx.sinh, "Cosh": mx.cosh, "ArcSinh": mx.arcsinh, "ArcTan": mx.arctan}

    def stand_in(name: str) -> Callable[..., mx.array]:
        def draw(x: mx.array, *others: Any, **named: Any) -> mx.array:
            given = (*others, *named.values())
            inputs.extend(value for value in given if isinstance(value, mx.array))
            return nodes[FUSED[name]](x)

        return draw

    for name in FUSED:
        setattr(mx.fast, name, stand_in(name))
    try:
        yield inputs
    finally:
        for name, original in originals.items():
            setattr(mx.fast, name, original)


def kernels(draw: Callable[[], Sequence[mx.array]]) -> Counter[str]:
    """Return how many kernels of each kind compute the arrays that `draw` makes, unevaluated."""
    with fused_as_one() as inputs:
        outputs = [*draw(), *inputs]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph"
        mx.export_to_dot(str(path), *outputs)
        found = Counter(_NODE.findall(path.read_text("utf-8")))
    fused = {node: name for name, node in FUSED.items()}
    return Counter(
        {fused.get(name, name): count for name, count in found.items() if name not in VIEWS}
    )


def step_arrays(step: Step) -> list[mx.array]:
    """Return all that a step computes, as `Step.schedule` starts it."""
    expected = [] if step.expected is None else [step.expected]
    return [step.report.packed, step.logits, *step.next_tree.arrays, *expected]


def of_step(streams: Streams, config: DecodeConfig) -> Counter[str]:
    """Return the kernels of one step over a full tree."""
    decoder = StreamDecoder(streams, config, TokenSampler())
    cache = _cache(streams.backbone)
    first = decoder.first_step(1, cache)
    decoder.finish(first, cache)
    mx.eval(step_arrays(first), cache.arrays)
    return kernels(lambda: step_arrays(decoder.next_step(first, None, None, cache)))  # type: ignore[arg-type]


def of_plain(backbone: Backbone) -> Counter[str]:
    """Return the kernels of a plain token of ours."""
    cache = _cache(backbone)
    return kernels(lambda: step_arrays(PlainDecoder(backbone, TokenSampler()).first_step(1, cache)))


def of_mlx_lm(model: Any) -> Counter[str]:
    """Return the kernels of a token of mlx-lm: logits, log-probabilities, argmax."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, CONTEXT), dtype=mx.int32), cache=cache))

    def draw() -> list[mx.array]:
        logits = model(mx.array([[1]]), cache=cache)[:, -1]
        return [mx.argmax(logits - mx.logsumexp(logits, keepdims=True), axis=-1)]

    return kernels(draw)


def _cache(backbone: Backbone) -> KVCache:
    """Return a cache with some text."""
    cache = backbone.new_cache()
    mx.eval(backbone.forward(mx.zeros((CONTEXT,), dtype=mx.int32), cache))
    cache.advance(CONTEXT)
    return cache


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print one line per setting, and with `--kinds` what they are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    parser.add_argument("--model", default="demo", help="model folder, hub id, or 'demo'")
    parser.add_argument("--streams", default="auto", help="stream folder, hub id or shipped name")
    parser.add_argument("--tree", action="append", help="setting, repeatable (default: chain, 16)")
    parser.add_argument("--kinds", action="store_true", help="also print what the kernels compute")
    args = parser.parse_args(argv)
    model, _ = load(args.model, streams=args.streams)
    if model.streams is None:
        raise StreamsError(f"there are no streams for {args.model}; name some with --streams.")
    found = {"mlx-lm": of_mlx_lm(model.model), "plain": of_plain(model.backbone)}
    for words in args.tree or ["chain", "16"]:
        found[words] = of_step(model.streams, DecodeConfig.parse(words))
    for name, counts in found.items():
        print(f"{name:12} {counts.total():5} kernels")
        if args.kinds:
            print("   ", ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, "kernels"))
