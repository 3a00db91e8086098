"""`specstream plan`: what steps cost here, what they yield, and which tree `--tree auto` takes.

specstream plan                              costs, forecasts, the choice and why
specstream plan --record chat=FILE           record the streams' acceptance on prompts
specstream plan --check --prompts FILE       predictions against measurements, tree by tree
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DecodeConfig
from ..errors import DataError, ModelError, OptionError, StreamsError
from ..generation.decode_options import add_model_options, streams_option
from ..planner.curve import BUDGET_S

if TYPE_CHECKING:
    from ..planner.curve import CostCurve


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream plan`."""
    parser = argparse.ArgumentParser(
        prog="specstream plan",
        description=(
            "Show what decoding steps cost on this machine, what they are expected to yield, and "
            "which tree --tree auto takes. Costs are measured once and cached."
        ),
    )
    add_model_options(parser)
    parser.add_argument(
        "--schedule",
        choices=("auto", "inline", "deferred"),
        default="auto",
        help="plans to consider, by when streams run (default: %(default)s)",
    )
    parser.add_argument("--refresh", action="store_true", help="measure costs again")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds that measuring may take (default: SPECSTREAM_PLAN_SECONDS, else {BUDGET_S:g})",
    )
    parser.add_argument(
        "--context", type=int, help="forecast for this many tokens of context (default: 256)"
    )
    parser.add_argument("--task", help="forecast for one of the recorded tasks (default: all)")
    parser.add_argument(
        "--record",
        action="append",
        metavar="TASK=FILE",
        help="record acceptance on a prompt file; may be repeated, one task each",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="where --record writes (default: into the streams' folder)"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare predictions with measurements on --prompts"
    )
    parser.add_argument("--prompts", metavar="FILE", help="prompts for --check (default: built in)")
    parser.add_argument("--num-prompts", type=int, help="use only the first prompts of each file")
    parser.add_argument(
        "--max-tokens", "-m", type=int, default=64, help="most tokens per answer (default: 64)"
    )
    parser.add_argument(
        "--max-rows",
        type=int,
        default=16,
        help="--check tries every tree of up to this many rows (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """Show, record or check."""
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    from ..loading.load import load

    model, tokenizer = load(
        arguments.model, adapter_path=arguments.adapter_path, streams=streams_option(arguments)
    )
    if model.streams is None:
        raise StreamsError(
            f"{arguments.model} has no streams, so there is nothing to plan; name some with --streams."
        )
    if arguments.record:
        return _record(arguments, model, tokenizer)
    from ..planner.costs import acceptance, model_plans, step_costs

    curve = step_costs(model, budget_s=arguments.budget, refresh=arguments.refresh)
    if curve is None:
        raise ModelError(
            "costs were not measured: measuring is turned off, or the model computes NaN; give "
            "--budget 10, or check the model with specstream verify."
        )
    if arguments.check:
        return _checked(arguments, model, tokenizer, curve)
    profile = acceptance(model)
    if arguments.task:
        profile = profile.only(arguments.task)
    allowed = set(model_plans(model, DecodeConfig(schedule=arguments.schedule)))
    plans = [plan for plan in curve.steps if plan in allowed]
    from ..bench.planner_report import as_json, show
    from ..planner.choose import forecasts

    found = forecasts(curve, profile, plans=plans, context=arguments.context)
    if arguments.json:
        print(json.dumps(as_json(curve, profile, found), ensure_ascii=False))
        return 0
    from rich.console import Console

    show(Console(), curve, profile, found)
    return 0


def _record(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> int:
    """Record acceptance on every file and write the profile."""
    from tqdm import tqdm

    from ..planner.acceptance import ACCEPTANCE_FILE, AcceptanceProfile
    from ..planner.record import record_answer
    from ..prompts import encode_prompt, read_prompts

    files = [_task_and_file(text) for text in arguments.record]
    prompts = {task: read_prompts(path, arguments.num_prompts) for task, path in files}
    target = Path(arguments.output or Path(model.streams_name) / ACCEPTANCE_FILE)
    answers = []
    with tqdm(total=sum(map(len, prompts.values())), unit="answer", disable=None) as bar:
        for task, some in prompts.items():
            for prompt in some:
                ids = encode_prompt(tokenizer, prompt)
                stop = tokenizer.eos_token_ids
                answers.append(record_answer(model.streams, ids, arguments.max_tokens, stop, task))
                bar.update()
    source = ", ".join(f"{len(some)} {task} prompts" for task, some in prompts.items())
    streams = model.streams
    profile = AcceptanceProfile(
        streams.num_streams,
        tuple(answers),
        bool(streams.config.conditioner_rank),
        source,
        streams.know_next_token,
    )
    profile.save(target)
    print(f"recorded {profile.num_positions} tokens ({source}) in {target}")
    return 0


def _checked(arguments: argparse.Namespace, model: Any, tokenizer: Any, curve: CostCurve) -> int:
    """Compare predictions with measurements and print both."""
    from tqdm import tqdm

    from ..bench.planner_check import check, scaled, small_trees
    from ..bench.planner_report import check_json, show_check
    from ..planner.measure import measure
    from ..prompts import built_in_prompts, encode_prompt, read_prompts

    prompts = (
        read_prompts(arguments.prompts, arguments.num_prompts)
        if arguments.prompts
        else built_in_prompts()[: arguments.num_prompts]
    )
    streams = model.streams
    plans = small_trees(streams.num_streams, arguments.max_rows, shared=streams.shared)
    # Every tree that is judged is measured, with no regard to what it promises.
    every = measure(streams, plans, budget_s=20 * (arguments.budget or 3.0))
    if every is not None:
        curve = replace(every, key=curve.key)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    with tqdm(total=len(ids) * (1 + len(plans)), unit="answer", disable=None) as bar:
        found = scaled(check(model, tokenizer, ids, arguments.max_tokens, curve, plans, bar.update))
    if arguments.json:
        print(json.dumps(check_json(found)))
        return 0
    from rich.console import Console

    show_check(Console(), found)
    return 0


def _task_and_file(text: str) -> tuple[str, str]:
    task, equals, path = text.partition("=")
    if not equals or not task or not path:
        raise OptionError(f"--record takes TASK=FILE, as chat=prompts.jsonl, got {text!r}.")
    return task, path


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of range before a model is loaded."""
    for name, least in (("num_prompts", 1), ("max_tokens", 2), ("max_rows", 2), ("context", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise OptionError(f"{flag} must be at least {least}, got {value}.")
    if arguments.budget is not None and not 0 <= arguments.budget < 3600:
        raise OptionError(f"--budget must be 0 to 3600 seconds, got {arguments.budget}.")
    if arguments.record and arguments.check:
        raise OptionError("--record and --check are two things; give one of them.")
    for text in arguments.record or ():
        path = Path(_task_and_file(text)[1]).expanduser()
        if not path.is_file():
            raise DataError(f"the prompts in {path} cannot be read: there is no such file.")
