"""`specstream demo`: the demo model answers a few prompts both ways; the texts are the same.

Each prompt is answered plainly and speculatively, in turn, the way that goes first alternating
so that neither has the warmer machine. Its text is shown once, while it is generated. At the
end stand a table and one line on whether speculation pays on this machine, and why.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from ..config import TreeSpec
from ..errors import OptionError, StreamsError
from ..generation.decode_options import (
    add_decode_options,
    add_model_options,
    decode_config,
    load_options,
)
from ..machine import Machine, keep_float32_exact

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from rich.console import Console

    from ..config import DecodeConfig
    from ..loading.load import StreamModel
    from ..verify import Comparison

DEFAULT_PROMPTS = 5
DEFAULT_MAX_TOKENS = 40


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
    # A fixed tree: `auto` would show plain decoding twice where speculation does not pay.
    add_decode_options(parser, tree=TreeSpec())
    return parser


def main(argv: list[str]) -> int:
    """Answer the prompts both ways and print what came of it."""
    arguments = build_parser().parse_args(argv)
    config = decode_config(arguments)
    keep_float32_exact()
    if arguments.num_prompts < 1 or arguments.max_tokens < 2:
        raise OptionError("the demo needs --num-prompts of at least 1 and --max-tokens of 2.")

    from rich.console import Console

    from ..planner.identity import weight_bits
    from ..prompts import built_in_prompts, encode_prompt

    console = Console(highlight=False)
    model, tokenizer = _load(arguments, console)
    prompts = built_in_prompts()[: arguments.num_prompts]
    comparisons = []
    for number, prompt in enumerate(prompts):
        console.print(f"\n[bold]{number + 1}. {_plain(prompt.title)}[/bold]")
        ids = encode_prompt(tokenizer, prompt)
        comparison = answer_both_ways(
            model, tokenizer, ids, arguments.max_tokens, config, plain_first=number % 2 == 0
        )
        comparisons.append(comparison)
        console.print(_mark(comparison), soft_wrap=True)
    _print_table(console, comparisons)
    bits = weight_bits(model.model)
    console.print(f"\n{verdict(comparisons, config, bits)}", soft_wrap=True)
    _print_next(console, arguments.model)
    return 1 if any(c.verdict == "mismatch" for c in comparisons) else 0


def _load(arguments: argparse.Namespace, console: Console) -> tuple[StreamModel, TokenizerWrapper]:
    """Load the model with its streams, saying how long it takes."""
    from ..loading.load import load, model_folder

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
        soft_wrap=True,
    )
    return model, tokenizer


def answer_both_ways(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    max_tokens: int,
    config: DecodeConfig,
    *,
    plain_first: bool,
) -> Comparison:
    """Answer one prompt both ways, printing the text of the way that goes first, and compare."""
    from ..verify import compare, replay

    runs = {}
    for count, plain in enumerate((plain_first, not plain_first)):
        on_token = _print_text if count == 0 else _silent
        runs[plain] = replay(
            model, tokenizer, prompt, max_tokens, None if plain else config, on_token
        )
        if count == 0:
            print(flush=True)
    return compare(model, tokenizer, prompt, runs[True], runs[False])


def _mark(comparison: Comparison) -> str:
    """Return the line under a text: whether the other way gave the same, and in what."""
    plain, ours = comparison.plain, comparison.speculative
    marks = {
        "identical": "[green]✓ identical[/green]",
        "near-tie": "[yellow]≈ differs at a near-tie[/yellow]",
        "mismatch": "[red]✗ DIFFERENT[/red]",
    }
    line = (
        f"   {marks[comparison.verdict]} both ways · {plain.stats.passes} → {ours.stats.passes} "
        f"passes · {ours.stats.tokens_per_step:.2f} tokens per pass · "
        f"{plain.seconds:.1f} s → {ours.seconds:.1f} s"
    )
    return line if comparison.divergence is None else f"{line}\n   {comparison.divergence}"


def _print_table(console: Console, comparisons: list[Comparison]) -> None:
    """Print passes, tokens per pass and seconds of all prompts, and their sums."""
    from rich.table import Table

    from ..speculation.statistics import SpeculationStats

    table = Table(title="\nPlain decoding → Speculative Streaming", title_justify="left")
    for name in ("prompt", "text", "tokens", "passes", "tokens per pass", "seconds"):
        table.add_column(name, justify="left" if name in ("prompt", "text") else "right")
    for number, comparison in enumerate(comparisons, start=1):
        plain, ours = comparison.plain, comparison.speculative
        table.add_row(
            str(number),
            comparison.verdict,
            str(ours.stats.tokens),
            f"{plain.stats.passes} → {ours.stats.passes}",
            f"{ours.stats.tokens_per_step:.2f}",
            f"{plain.seconds:.1f} → {ours.seconds:.1f}",
        )
    table.add_section()
    plain_stats = sum((c.plain.stats for c in comparisons), SpeculationStats())
    stats = sum((c.speculative.stats for c in comparisons), SpeculationStats())
    before, after = seconds(comparisons)
    table.add_row(
        "all",
        "",
        str(stats.tokens),
        f"{plain_stats.passes} → {stats.passes}",
        f"{stats.tokens_per_step:.2f}",
        f"{before:.1f} → {after:.1f}",
    )
    console.print(table)
    console.print("seconds: from the first token to the last, without reading the prompt")


def seconds(comparisons: list[Comparison]) -> tuple[float, float]:
    """Return the seconds that plain and speculative decoding took for all prompts."""
    plain = sum(comparison.plain.seconds for comparison in comparisons)
    return plain, sum(comparison.speculative.seconds for comparison in comparisons)


def verdict(comparisons: list[Comparison], config: DecodeConfig, bits: int) -> str:
    """Return one honest line: does speculation pay on this machine, and why.

    A pass is timed from the answers themselves: seconds over passes, both ways. bits: of the weights.
    """
    from ..speculation.statistics import SpeculationStats

    plain = sum((c.plain.stats for c in comparisons), SpeculationStats())
    ours = sum((c.speculative.stats for c in comparisons), SpeculationStats())
    before, after = seconds(comparisons)
    cost = (after / ours.passes) / (before / plain.passes)
    fewer = f"{ours.tokens_per_step:.2f} tokens per pass"
    price = f"a pass with the tree '{config.tree}' costs {cost:.2f} plain passes"
    ratio = before / after
    place = Machine.read().summary
    if ratio >= 1.05:
        return f"On this machine ({place}) it is {ratio:.2f}x as fast: {fewer}, and {price}."
    gain = "gains nothing in time" if ratio > 0.95 else f"is slower ({ratio:.2f}x)"
    return f"On this machine ({place}) it {gain}: {fewer}, but {price}. {_why(bits)}"


def _why(bits: int) -> str:
    """Say why a pass over several rows costs what it does here, and where it does not."""
    if Machine.read().backend in ("metal", "cuda"):
        if bits >= 32:
            return (
                "This model is a GPU's worst case: it is so small that starting kernels takes as long "
                "as reading its weights, and in float32 no kernel shares a reading among few rows, so "
                "that wide trees cost little more than narrow ones: try --tree 16. Larger models in "
                "16 or 4 bits gain more."
            )
        tree = "'16'" if bits >= 16 else "'chain2'"
        return f"Try another --tree: {tree} suits {bits}-bit weights."
    return (
        "On this CPU a pass costs more with every row it verifies; on a Mac's GPU, which waits for "
        "memory, the rows of a small tree cost little: `specstream demo` there tells. Outside this "
        "demo the default is --tree auto, which decodes plainly where no tree pays."
    )


def _print_next(console: Console, model: str) -> None:
    lines = [
        "Try next:",
        f'  specstream generate --model {model} --prompt "Why is the sky blue?"',
        f"  specstream verify --model {model} --tree chain --tree 16",
        f"  specstream demo --model {model} --tree 16     (a wide tree: fewer passes, dearer ones)",
    ]
    console.print("\n" + "\n".join(lines), soft_wrap=True)


def _print_text(text: str) -> None:
    print(text, end="", flush=True)


def _silent(_: str) -> None:
    pass


def _plain(text: str) -> str:
    """Return text without meaning to rich's markup."""
    return text.replace("[", r"\[")
