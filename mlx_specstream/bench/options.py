"""The words of `specstream bench`, and the settings and methods that they describe."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import AUTO, DecodeConfig
from ..errors import OptionError
from ..generation.decode_options import add_decode_options
from ..loading.demo import DEMO_NAME
from .cases import BUILT_IN
from .methods import MLX_LM, Method, named, parse_setting, parse_streams
from .result import BenchSettings

QUICK_LIMIT_S = 105.0
QUICK_CATEGORIES = ("chat", "code", "summarize", "sql")
QUICK_TOKENS = 48
TURN_TOKENS = 16


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream bench`."""
    parser = argparse.ArgumentParser(
        prog="specstream bench",
        description=(
            "Answer prompts with mlx-lm, with our plain loop and speculatively, in turns, and "
            "compare speed, memory and output. Exits 1 if an output differs."
        ),
    )
    what = parser.add_argument_group("what to decode with")
    what.add_argument(
        "--model", default=DEMO_NAME, help="model folder, hub id, or 'demo' (default)"
    )
    what.add_argument("--adapter-path", help="LoRA adapters of mlx-lm to load with the model")
    what.add_argument(
        "--streams",
        action="append",
        help=(
            "streams for all categories, and after commas for single ones: "
            "'demo-chat,sql=demo-sql'; repeat to compare sets; 'none' leaves speculation out "
            "(default: what fits the model)"
        ),
    )
    add_decode_options(what, several_trees=True)
    what.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="WORDS",
        help="a further setting: 'tree=16 prune=8 schedule=inline conditioning=no streams=NAME'",
    )
    what.add_argument("--draft-model", help="let mlx-lm's own speculative decoding compete with it")
    what.add_argument(
        "--num-draft-tokens", type=int, default=3, help="drafts a pass of that (default: 3)"
    )
    asked = parser.add_argument_group("what to ask")
    asked.add_argument(
        "--prompts",
        action="append",
        metavar="[CATEGORY=]FILE",
        help="Spec-Bench or mlx-lm JSONL, or a prompt per line; repeatable (default: 69 built-in prompts)",
    )
    asked.add_argument("--categories", help="only these, separated by commas")
    asked.add_argument("--num-prompts", type=int, help="prompts per category, drawn by --seed")
    asked.add_argument("--max-tokens", "-m", type=int, help="most tokens per answer (default: 128)")
    asked.add_argument("--repeats", type=int, default=1, help="times to ask each (default: 1)")
    asked.add_argument(
        "--turn-tokens",
        type=int,
        default=TURN_TOKENS,
        metavar="N",
        help="tokens that a method decodes before the next has its turn, 0 for whole answers "
        "(default: %(default)s)",
    )
    asked.add_argument("--seed", type=int, default=0, help="which prompts are drawn (default: 0)")
    asked.add_argument(
        "--quick", action="store_true", help="be done within two minutes, and say what is left out"
    )
    asked.add_argument(
        "--exhaustive",
        type=int,
        nargs="?",
        const=16,
        default=0,
        metavar="ROWS",
        help="then compare every tree of up to ROWS (16) rows with the planner's prediction",
    )
    files = parser.add_argument_group("results")
    files.add_argument(
        "--output", metavar="FOLDER", help="where to write (default: specstream-bench/...)"
    )
    files.add_argument("--resume", metavar="RESULT", help="go on with an interrupted benchmark")
    files.add_argument("--rerun", metavar="RESULT", help="measure again with a result's settings")
    files.add_argument(
        "--from", dest="source", metavar="RESULT", help="only write the report again"
    )
    files.add_argument("--no-plots", action="store_true", help="write no plots")
    return parser


def settings_of(arguments: argparse.Namespace) -> BenchSettings:
    """Return what the options describe.

    Raises:
        OptionError: a value is out of range or cannot be read.
    """
    for name in ("num_prompts", "max_tokens", "repeats", "num_draft_tokens"):
        value, least = getattr(arguments, name), 2 if name == "max_tokens" else 1
        if value is not None and value < least:
            raise OptionError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
    if arguments.turn_tokens < 0:
        raise OptionError(f"--turn-tokens must be at least 0, got {arguments.turn_tokens}.")
    if arguments.exhaustive and not 2 <= arguments.exhaustive <= 64:
        raise OptionError(f"--exhaustive takes 2 to 64 rows, got {arguments.exhaustive}.")
    quick = arguments.quick
    sources = [absolute(source) for source in arguments.prompts or [BUILT_IN]]
    categories = [word.strip() for word in (arguments.categories or "").split(",") if word.strip()]
    if quick and not categories and sources == [BUILT_IN]:
        categories = list(QUICK_CATEGORIES)
    methods = methods_of(arguments)
    named(methods)
    return BenchSettings(
        model=arguments.model,
        adapter_path=arguments.adapter_path,
        sources=sources,
        categories=categories,
        num_prompts=arguments.num_prompts,
        max_tokens=arguments.max_tokens or (QUICK_TOKENS if quick else 128),
        repeats=arguments.repeats,
        seed=arguments.seed,
        draft_model=arguments.draft_model,
        limit_s=QUICK_LIMIT_S if quick else 0.0,
        exhaustive=arguments.exhaustive,
        methods=methods,
        turn_tokens=arguments.turn_tokens,
    )


def methods_of(arguments: argparse.Namespace) -> list[Method]:
    """Return the methods that the options name, mlx-lm first.

    Raises:
        OptionError: a setting cannot be read.
    """
    from .competitors import NO_STREAMS, setting_config

    found = [MLX_LM, Method("plain")]
    sets = arguments.streams or [AUTO]
    for streams in sets:
        if streams.lower() == NO_STREAMS:
            if arguments.drafts is None or "lookup" not in arguments.drafts:
                continue
            streams = NO_STREAMS
        parse_streams(streams)
        trees = arguments.tree or ([] if arguments.setting else [str(DecodeConfig().tree)])
        found += [
            Method(
                "streams",
                tree=tree,
                prune=arguments.prune,
                schedule=arguments.schedule,
                conditioning=not arguments.no_conditioning,
                streams=streams,
                drafts=arguments.drafts,
            )
            for tree in trees
        ]
    found += [parse_setting(text, sets[0]) for text in arguments.setting]
    if arguments.draft_model:
        found.append(Method("draft-model", num_draft_tokens=arguments.num_draft_tokens))
    for method in found:
        if method.kind == "streams":
            setting_config(method)
    return found


def absolute(source: str) -> str:
    """Return a source of prompts so that it can be found again from another folder."""
    if source == BUILT_IN:
        return source
    category, equals, name = source.partition("=")
    if equals and not Path(source).expanduser().exists():
        return f"{category}={Path(name).expanduser().absolute()}"
    return str(Path(source).expanduser().absolute())
