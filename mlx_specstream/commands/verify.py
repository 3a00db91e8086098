"""`specstream verify`: are speculative answers the plain ones, token for token, and if not, why.

Exit status 1 if a divergence is more than rounding explains.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import inf
from typing import TYPE_CHECKING, TextIO

from ..config import DecodeConfig, TreeSpec
from ..errors import OptionError, StreamsError
from ..generation.decode_options import (
    add_decode_options,
    add_model_options,
    decode_config,
    described,
    load_options,
)
from ..machine import TF32, Machine, keep_float32_exact
from ..weights.files import without_folders

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..loading.load import StreamModel
    from ..verify import Comparison

DEFAULT_MAX_TOKENS = 64
QUICK_LIMIT_S = 105.0
QUICK_PROMPTS = 4  # that --quick shortens answers for, where the machine is slow


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream verify`."""
    parser = argparse.ArgumentParser(
        prog="specstream verify",
        description=(
            "Answer prompts plainly and speculatively, greedily, and compare the tokens. "
            "Exits 1 if they differ by more than rounding explains."
        ),
    )
    add_model_options(parser)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help=(
            "mlx-lm's chat, completions or text JSONL, or plain text with a prompt per line "
            "(default: a built-in dozen)"
        ),
    )
    parser.add_argument("--num-prompts", type=int, help="use only the first prompts of the file")
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        help="most tokens per answer (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="be done within two minutes: with as many prompts as fit, and shorter answers on a "
        "slow machine",
    )
    add_decode_options(parser, tree=TreeSpec(), several_trees=True, lossy=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """Replay the prompts and print what was found."""
    began = time.perf_counter()
    arguments = build_parser().parse_args(argv)
    if arguments.num_prompts is not None and arguments.num_prompts < 1:
        raise OptionError(f"--num-prompts must be at least 1, got {arguments.num_prompts}.")
    if arguments.max_tokens < 1:
        raise OptionError(f"--max-tokens must be at least 1, got {arguments.max_tokens}.")
    if arguments.lossy_typical is not None:
        raise OptionError(
            "verify compares with plain decoding, from which typical acceptance (lossy) differs by "
            "design; leave --lossy-typical out."
        )
    trees = arguments.tree or [str(TreeSpec())]
    configs = [decode_config(arguments, tree) for tree in trees]
    keep_float32_exact()

    from ..loading.load import load
    from ..prompts import built_in_prompts, encode_prompt, read_prompts

    prompts = (
        read_prompts(arguments.prompts, arguments.num_prompts)
        if arguments.prompts
        else built_in_prompts()[: arguments.num_prompts]
    )
    model, tokenizer = load(arguments.model, **load_options(arguments))
    if model.streams is None and model.drafter is None:
        raise StreamsError(
            f"{arguments.model} has no streams, so there is nothing to verify; name some with "
            "--streams, or what drafts with --draft-model."
        )
    if not arguments.json:
        _say("\n".join(conditions(model)))
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    titles = [prompt.title for prompt in prompts]
    found: list[list[Comparison]] = []
    interrupted = False
    until = began + QUICK_LIMIT_S if arguments.quick else inf
    try:
        for comparisons in _compared(model, tokenizer, ids, arguments.max_tokens, configs, until):
            found.append(comparisons)
            if not arguments.json:
                place = f"[{len(found)}/{len(ids)}] {_cut(titles[len(found) - 1])}"
                _say("\n".join([place, *_lines(configs, comparisons)]))
    except KeyboardInterrupt:
        # An hour's comparing is not lost to a key: what is known is reported, and is not a pass.
        if not found:
            raise
        interrupted = True
        _say(f"interrupted after {len(found)} of {len(ids)} prompts", sys.stderr)
    if arguments.json:
        print(json.dumps(_record(model, configs, found, len(ids)), ensure_ascii=False))
    else:
        late = arguments.quick and not interrupted
        print("\n".join(_sums(configs, found, len(ids), ": the time was up" if late else "")))
    mismatch = any(c.verdict == "mismatch" for comparisons in found for c in comparisons)
    if mismatch:
        return 1
    return 130 if interrupted else 0


def _compared(
    model: StreamModel,
    tokenizer: TokenizerWrapper,
    prompts: list[list[int]],
    max_tokens: int,
    configs: list[DecodeConfig],
    until: float = inf,
) -> Iterator[list[Comparison]]:
    """Answer each prompt plainly, then with every config; yield its comparisons with the first.

    until: the time of `time.perf_counter` to be done by: prompts that do not fit are left out, but for
    the first, and answers are cut so that `QUICK_PROMPTS` of them fit.
    """
    from tqdm import tqdm

    from ..verify import compare, replay

    # In a pipe the lines of text alone tell how far it is: a bar would run into them.
    total = len(prompts) * (1 + len(configs))
    with tqdm(total=total, unit="answer", dynamic_ncols=True, disable=None) as bar:
        longest = 0.0
        for number, prompt in enumerate(prompts):
            start = time.perf_counter()
            if number and start + longest > until:
                return
            ways = max(1, QUICK_PROMPTS - number) * (1 + len(configs))
            share = start + (until - start) / ways
            plain = replay(model, tokenizer, prompt, max_tokens, None, until=share)
            bar.update()
            cut = len(plain.tokens) if time.perf_counter() > share else max_tokens
            comparisons = []
            for config in configs:
                speculative = replay(model, tokenizer, prompt, cut, config)
                comparisons.append(compare(model, tokenizer, prompt, plain, speculative))
                bar.update()
            longest = max(longest, time.perf_counter() - start)
            yield comparisons


def conditions(model: StreamModel) -> list[str]:
    """Return lines on what the comparison rests on: the precision, and kernels of hybrids."""
    from ..verify import precision_of

    precision = precision_of(model)
    lines = [f"compared in {precision}"]
    if precision.startswith("float32 (TF32)"):
        lines = [
            f"compared in {precision}: {TF32} lets this GPU take factors at 10 bits in passes of "
            f"several rows, so answers may part at near-ties; {TF32}=0 keeps float32 exact"
        ]
    if model.backbone.is_recurrent and Machine.read().backend == "metal":
        lines.append(
            "layers that keep a state take other Metal kernels for a draft than for one row, which no "
            "test on a CPU has run: this comparison is the test"
        )
    return lines


def counted(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """Return how many comparisons had each verdict."""
    verdicts = [comparison.verdict for comparison in comparisons]
    return {name: verdicts.count(name) for name in ("identical", "near-tie", "mismatch")}


def _lines(configs: list[DecodeConfig], comparisons: list[Comparison]) -> list[str]:
    """Return a prompt's lines: one per config, and one more where the answers part."""
    lines = []
    for config, comparison in zip(configs, comparisons, strict=True):
        stats = comparison.speculative.stats
        lines.append(
            f"  {_name(config):<18} {comparison.verdict:<9}  {stats.tokens:>4} tokens "
            f"{stats.passes:>4} passes {stats.tokens_per_step:5.2f} per pass"
        )
        if comparison.divergence is not None:
            lines.append(f"    {comparison.divergence}")
    return lines


def _sums(
    configs: list[DecodeConfig], found: list[list[Comparison]], asked: int, why: str
) -> list[str]:
    """Return a line per config: the verdicts of all prompts and their figures; why: there are fewer."""
    from ..speculation.statistics import SpeculationStats

    longest = max(len(c.plain.tokens) for comparisons in found for c in comparisons)
    whole = len(found) == asked
    count = "all" if whole else f"{len(found)} of"
    lines = [f"{count} {asked} prompts, answers of up to {longest} tokens{'' if whole else why}"]
    for config, comparisons in zip(configs, zip(*found, strict=True), strict=True):
        total = sum((c.speculative.stats for c in comparisons), SpeculationStats())
        counts = ", ".join(f"{count} {name}" for name, count in counted(comparisons).items())
        figures = (f"    {part}" for part in str(total).split("; "))  # a line would be too long
        lines += [f"  {_name(config):<18} {counts}", *figures]
    return lines


def _name(config: DecodeConfig) -> str:
    return f"{config.tree}, pruned to {config.prune.keep}" if config.prune else f"{config.tree}"


def _say(text: str, file: TextIO | None = None) -> None:
    """Print above the progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=file)


def _record(
    model: StreamModel, configs: list[DecodeConfig], found: list[list[Comparison]], asked: int
) -> dict[str, object]:
    """Return what --json prints; fewer prompts than `asked` if it was interrupted."""
    from ..verify import precision_of

    return {
        "prompts_asked": asked,
        "model": without_folders(model.name),
        "streams": without_folders(model.streams_name),
        "dtype": str(model.backbone.dtype).rpartition(".")[2],
        "precision": precision_of(model),
        "runs": [
            {
                "config": described(config),
                **counted(comparisons),
                "prompts": [_prompt_record(comparison) for comparison in comparisons],
            }
            for config, comparisons in zip(configs, zip(*found, strict=True), strict=True)
        ],
    }


def _prompt_record(comparison: Comparison) -> dict[str, object]:
    divergence = comparison.divergence
    record: dict[str, object] = {
        "verdict": comparison.verdict,
        "divergence": None if divergence is None else _finite(asdict(divergence)),
    }
    for name, run in (("plain", comparison.plain), ("speculative", comparison.speculative)):
        record[name] = {
            "tokens": run.tokens,
            "seconds": round(run.seconds, 4),
            "figures": run.stats.to_dict(),
        }
    return record


def _finite(values: dict[str, object]) -> dict[str, object]:
    """Return values as JSON can hold them: infinity becomes null."""
    infinite = (float("inf"), -float("inf"))
    return {key: None if value in infinite else value for key, value in values.items()}


def _cut(title: str, width: int = 48) -> str:
    return title if len(title) <= width else title[: width - 1] + "…"
