"""`specstream demo`: the demo model answers a few prompts plainly and speculatively; the texts are the same.

Each prompt is answered plainly, with a fixed tree and with `--tree auto`, which of them goes first
changing so that none has the warmer machine. Its text is shown once, while it is generated. At
the end stand a table and one line on what speculation gains on this machine, and why. Prompts of a
kind for which streams are shipped, as SQL, are answered with these.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import AUTO, DecodeConfig, TreeSpec
from ..errors import OptionError, StreamsError
from ..generation.decode_options import (
    add_decode_options,
    add_model_options,
    decode_config,
    load_options,
)
from ..machine import BLAS_ADVICE, REFERENCE_BLAS, Machine, keep_float32_exact
from ..machine.load import Watch
from ..weights.files import without_folders

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from rich.console import Console

    from ..loading.load import StreamModel
    from ..prompts import Prompt
    from ..verify import Comparison, Replayed

DEFAULT_PROMPTS = 4
DEFAULT_MAX_TOKENS = 64


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream demo`."""
    parser = argparse.ArgumentParser(
        prog="specstream demo",
        description=(
            "Answer a few built-in prompts plainly and with Speculative Streaming, and "
            "compare texts, passes and times. Exits 1 if a text differs by more than rounding."
        ),
    )
    add_model_options(parser)
    parser.add_argument(
        "--num-prompts",
        type=int,
        default=DEFAULT_PROMPTS,
        help="how many of the built-in prompts (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        help="most tokens per answer (default: %(default)s)",
    )
    # A fixed tree, beside which `auto` is shown.
    add_decode_options(parser, tree=TreeSpec())
    return parser


def main(argv: list[str]) -> int:
    """Answer the prompts in every way and print what came of it."""
    arguments = build_parser().parse_args(argv)
    config = decode_config(arguments)
    keep_float32_exact()
    if arguments.num_prompts < 1 or arguments.max_tokens < 2:
        raise OptionError("the demo needs --num-prompts of at least 1 and --max-tokens of 2.")

    from rich.console import Console

    from ..prompts import encode_prompt

    console = Console(highlight=False)
    model, tokenizer = _load(arguments, console)
    auto = replace(config, tree=DecodeConfig().tree)
    configs = [auto] if config == auto else [config, auto]
    prompts = demo_prompts(arguments.num_prompts)
    watch = Watch()
    by_kind = {kind: model for kind, _ in prompts}
    if arguments.streams == AUTO:
        by_kind = {kind: with_streams_for(kind, model) for kind in by_kind}
    _get_ready(by_kind, tokenizer, encode_prompt(tokenizer, prompts[0][1]), auto, console)
    found: list[list[Comparison]] = []
    for number, (kind, prompt) in enumerate(prompts):
        title = prompt.title if len(prompt.title) <= 60 else f"{prompt.title[:59]}…"
        console.print(f"\n[bold]{number + 1}. {kind}: {_plain(title)}[/bold]")
        if by_kind[kind] is not model:
            console.print(f"   with the streams {without_folders(by_kind[kind].streams_name)}")
        ids = encode_prompt(tokenizer, prompt)
        runs = answer_in_turn(by_kind[kind], tokenizer, ids, arguments.max_tokens, configs, number)
        found.append(runs)
        for way, comparison in zip(configs, runs, strict=True):
            console.print(_mark(way, comparison))
    kinds = [kind for kind, _ in prompts]
    _print_table(console, kinds, configs, found)
    _print_next(console, arguments.model)
    _print_larger(console)
    line = verdict(kinds, configs, found)
    if watch.is_busy:
        line += f" But {watch.sentence()}"
    console.print(f"\n[bold]{line}[/bold]")
    return 1 if any(c.verdict == "mismatch" for runs in found for c in runs) else 0


def demo_prompts(count: int) -> list[tuple[str, Prompt]]:
    """Return prompts, each with its kind: what speculation is good at, what not, then ordinary chat."""
    from ..prompts import built_in_prompts
    from ..prompts.read import DEMO, prompt_of, read_records

    shown = []
    for record, where in read_records(DEMO):
        assert isinstance(record, dict)
        shown.append((str(record["kind"]), prompt_of(record, where)))
    return [*shown, *(("chat", prompt) for prompt in built_in_prompts())][:count]


def with_streams_for(kind: str, model: StreamModel) -> StreamModel:
    """Return the model with the streams that are shipped for a kind of prompt, else as it is."""
    from ..speculation.streams import Streams
    from ..weights.shipped import shipped_for

    found = shipped_for(kind, model.model)
    if found is None or str(found.folder) == model.streams_name:
        return model
    joined = Streams(model.backbone, found.config, found.tensors)
    return replace(model, streams=joined, streams_name=str(found.folder))


def _get_ready(
    models: Mapping[str, StreamModel],
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    config: DecodeConfig,
    console: Console,
) -> None:
    """Answer a little both ways, so that no prompt pays for what is done once, costs measured included."""
    from ..verify import replay

    started = time.perf_counter()
    for model in {id(model): model for model in models.values()}.values():
        for way in (config, None):
            replay(model, tokenizer, prompt, 8, way)
    console.print(f"Warmed up, the costs of steps known: {time.perf_counter() - started:.1f} s.")


def _load(arguments: argparse.Namespace, console: Console) -> tuple[StreamModel, TokenizerWrapper]:
    """Load the model with its streams, saying how long it takes."""
    from ..loading.folders import model_folder
    from ..loading.load import load

    started = time.perf_counter()
    options = load_options(arguments)
    # Fetches, with progress of its own.
    folder = model_folder(arguments.model, options["revision"])
    options["revision"] = None
    with console.status(f"Loading {arguments.model}"):
        model, tokenizer = load(str(folder), **options)
    if model.streams is None:
        raise StreamsError(
            f"there are no streams for {arguments.model}, so there is nothing to show; name some "
            "with --streams."
        )
    config = model.streams.config
    console.print(
        f"{arguments.model} with {config.num_streams} streams in its upper "
        f"{config.num_msa_layers} of {model.backbone.num_layers} layers, loaded in "
        f"{time.perf_counter() - started:.1f} s. Every prompt is answered plainly and "
        "speculatively, greedily.",
    )
    return replace(model, name=arguments.model), tokenizer


def answer_in_turn(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    max_tokens: int,
    configs: Sequence[DecodeConfig],
    first: int,
) -> list[Comparison]:
    """Answer one prompt plainly and with every config, the `first`-th way first, which is printed.

    Returns the comparison of every config's answer with the plain one.
    """
    from ..verify import compare, replay

    ways = [None, *configs]
    runs: dict[int, Replayed] = {}
    for count in range(len(ways)):
        way = (first + count) % len(ways)
        on_token = _print_text if count == 0 else _silent
        runs[way] = replay(model, tokenizer, prompt, max_tokens, ways[way], on_token)
        if count == 0:
            print(flush=True)
    return [compare(model, tokenizer, prompt, runs[0], runs[1 + i]) for i in range(len(configs))]


def _mark(config: DecodeConfig, comparison: Comparison) -> str:
    """Return the line under a text: whether this way gave the same as plain decoding, and in what."""
    plain, ours = comparison.plain, comparison.speculative
    marks = {
        "identical": "[green]✓ identical[/green]",
        "near-tie": "[yellow]≈ differs at a near-tie[/yellow]",
        "mismatch": "[red]✗ DIFFERENT[/red]",
    }
    line = (
        f"   {marks[comparison.verdict]} with --tree {config.tree} · {plain.stats.passes} → "
        f"{ours.stats.passes} passes · {plain.seconds:.1f} → {ours.seconds:.1f} s"
    )
    return line if comparison.divergence is None else f"{line}\n   {comparison.divergence}"


def _print_table(
    console: Console,
    kinds: Sequence[str],
    configs: Sequence[DecodeConfig],
    found: Sequence[Sequence[Comparison]],
) -> None:
    """Print tokens, plain seconds, and for every config tokens per pass, seconds and speed-up."""
    from rich.table import Table

    table = Table(title="\nPlain and speculative decoding", title_justify="left")
    table.add_column("prompt")
    for name in ("tokens", "plain"):
        table.add_column(name, justify="right")
    for config in configs:
        table.add_column(f"tree {config.tree}", justify="right")
    rows = [*zip(kinds, ([c] for c in zip(*found_by(found), strict=True)), strict=True)]
    for name, group in [*rows, ("all", list(zip(*found_by(found), strict=True)))]:
        if name == "all":
            table.add_section()
        columns = list(zip(*group, strict=True))
        tokens = sum(c.speculative.stats.tokens for c in columns[0])
        cells = []
        for comparisons in columns:
            before, after = seconds(comparisons)
            per_pass = sum(c.speculative.stats.tokens for c in comparisons) / max(
                1, sum(c.speculative.stats.passes for c in comparisons)
            )
            cells.append(f"{per_pass:.1f}/pass {after:.1f} s {before / after:.2f}x")
        table.add_row(name, str(tokens), f"{seconds(columns[0])[0]:.1f} s", *cells)
    console.print(table)
    console.print("Seconds from the first token to the last, without reading the prompt.")


def found_by(found: Sequence[Sequence[Comparison]]) -> list[list[Comparison]]:
    """Return the comparisons by config, in the order of prompts."""
    return [list(runs) for runs in zip(*found, strict=True)]


def seconds(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """Return the seconds that plain and speculative decoding took for all prompts."""
    plain = sum(comparison.plain.seconds for comparison in comparisons)
    return plain, sum(comparison.speculative.seconds for comparison in comparisons)


def verdict(
    kinds: Sequence[str], configs: Sequence[DecodeConfig], found: Sequence[Sequence[Comparison]]
) -> str:
    """Return one honest line: what speculation gains on this machine, and why.

    A pass is timed from the answers themselves: seconds over passes, both ways..
    """
    by_config = found_by(found)
    before, after = seconds(by_config[-1])
    gains = ", ".join(
        f"{kind} {plain / ours:.2f}x"
        for kind, (plain, ours) in zip(kinds, map(_pair, by_config[-1]), strict=True)
    )
    line = f"--tree auto: {_gain(before / after)} ({gains})."
    if len(configs) > 1:
        before, after = seconds(by_config[0])
        line += f" Always with the tree '{configs[0].tree}': {_gain(before / after)}; "
        line += _price(by_config[0])
    machine = Machine.read()
    line = f"On this machine ({machine.summary}), {line}"
    if machine.blas == REFERENCE_BLAS:
        line += f" MLX computes with the slow reference BLAS here: {BLAS_ADVICE}."
    return line


def _pair(comparison: Comparison) -> tuple[float, float]:
    return comparison.plain.seconds, comparison.speculative.seconds


def _gain(ratio: float) -> str:
    if ratio >= 1.05:
        return f"{ratio:.2f}x as fast as plain decoding"
    return "no gain in time" if ratio > 0.95 else f"slower than plain decoding ({ratio:.2f}x)"


def _price(comparisons: Sequence[Comparison]) -> str:
    """Say what a pass with the tree yields and costs."""
    from ..speculation.statistics import SpeculationStats

    plain = sum((c.plain.stats for c in comparisons), SpeculationStats())
    ours = sum((c.speculative.stats for c in comparisons), SpeculationStats())
    before, after = seconds(comparisons)
    cost = (after / max(1, ours.passes)) / (before / max(1, plain.passes))
    return f"its passes yield {ours.tokens_per_step:.2f} tokens and cost {cost:.2f} plain ones."


def _print_larger(console: Console) -> None:
    """Print what larger models are expected to gain on this chip, where that is known."""
    from .doctor import expectations, show_expected

    show_expected(console, expectations(Machine.read(), None))


def _print_next(console: Console, model: str) -> None:
    lines = [
        "Try next:",
        f'  specstream generate --model {model} --prompt "Why is the sky blue?"',
        f"  specstream verify --model {model} --tree chain --tree 16",
        f"  specstream demo --model {model} --tree chain2",
    ]
    console.print("\n" + "\n".join(lines), soft_wrap=True)


def _print_text(text: str) -> None:
    print(text, end="", flush=True)


def _silent(_: str) -> None:
    pass


def _plain(text: str) -> str:
    """Return text without meaning to rich's markup."""
    return text.replace("[", r"\[")
