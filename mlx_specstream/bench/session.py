"""A benchmark as a person sees it: loading, an estimate before it starts, progress, and an end."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..machine import BLAS_ADVICE, REFERENCE_BLAS, Machine
from .cases import Case, names
from .competitors import described_model, open_competitors
from .methods import MLX_LM
from .result import AskedPrompt, MethodRun, Result
from .roofline import measure_ceilings
from .run import Bench, now
from .trees import CHECKED_PROMPTS, MEASURE_S, exhaustive, num_answers, plan_costs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def measured(
    result: Result, cases: list[Case], path: Path, console: Console, *, resumed: bool
) -> None:
    """Measure what `result` lacks, writing it to `path` as it grows.

    Raises:
        ModelError, StreamsError, OptionError: something cannot be loaded or used.
        OutputError: the result cannot be written.
    """
    begun, settings = time.perf_counter(), result.settings
    machine = Machine.read()
    notes = warnings_for(machine, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)
    if resumed and machine != result.machine:
        notes.append("it was resumed on another machine or with other versions than it began with.")
    for note in notes:
        console.print(f"[yellow]Note:[/yellow] {note}", soft_wrap=not console.is_terminal)
    result.notes += [note for note in notes if note not in result.notes]
    with console.status(f"Loading {settings.model}"):
        competitors = open_competitors(
            settings.model,
            settings.adapter_path,
            result.named_methods,
            names(cases),
            settings.draft_model,
        )
    result.model = result.model or described_model(competitors, settings.model)
    result.started = result.started or now()
    for name, method in competitors.methods.items():
        if method.kind == "streams":
            console.print(
                f"{name}: streams {method.streams}", soft_wrap=not console.is_terminal, markup=False
            )
    # Not under a spinner: the planner says itself that it measures.
    result.plans = plan_costs(competitors) or result.plans
    for streams, planned in result.plans.items():
        console.print(
            f"auto, {Path(streams).name}: begins with {planned['chosen']}",
            soft_wrap=not console.is_terminal,
            markup=False,
        )
    bench = Bench(competitors, cases, result, path)
    bench.begun = begun
    with console.status("Warming up") as status:
        bench.on_step = status.update
        bench.warm_up()
        if result.ceilings is None:
            status.update("Measuring memory and arithmetic")
            result.ceilings = measure_ceilings(competitors.model.backbone.dtype).to_dict()
    done = {(asked.category, asked.sha256) for asked in result.asked}
    left = sum((case.category, case.sha256) not in done for case in bench.cases)
    limit = settings.limit_s
    estimate = bench.estimate_s() * left / len(bench.cases)
    told = f"at most {duration(min(estimate, limit) if limit else estimate)}"
    console.print(
        f"{left} prompts in {len(names(bench.cases))} categories, {len(bench.names)} methods, at most "
        f"{settings.max_tokens} tokens each: {told}."
        + (" As many as fit are asked." if limit and estimate > limit else ""),
        soft_wrap=not console.is_terminal,
    )
    with _progress(console) as progress:
        task = progress.add_task("", total=left)

        def on_prompt(asked: Sequence[AskedPrompt]) -> None:
            progress.advance(task)
            text = prompt_line(asked)
            console.print(text, markup=False, soft_wrap=not console.is_terminal)

        bench.on_step = lambda text: progress.update(task, description=text[:40])
        bench.on_prompt = on_prompt
        bench.measure()
    if settings.exhaustive:
        compare_trees(bench, console)
    if settings.limit_s:
        result.left_out.append(
            f"answers end after {settings.max_tokens} tokens; a full run also asks the other "
            "categories and more prompts"
        )
        result.save(path)


def compare_trees(bench: Bench, console: Console) -> None:
    """Answer some prompts of each category with every small tree, and keep what came of it."""
    result, competitors = bench.result, bench.competitors
    settings = result.settings
    count = settings.num_prompts or CHECKED_PROMPTS
    groups = {
        name: [case for case in bench.cases if case.category == name][:count]
        for name in names(bench.cases)
        if name not in result.trees
    }
    answers = {
        name: num_answers(competitors, cases, name, settings.exhaustive)
        for name, cases in groups.items()
    }
    each = max((run.prefill_s + run.decode_s for run in bench.plain_runs()), default=1.0)
    told = duration(sum(answers.values()) * each + MEASURE_S * len(groups))
    console.print(
        f"Every tree of up to {settings.exhaustive} rows: {sum(answers.values())} answers, about {told}."
    )
    with _progress(console) as progress:
        for name, cases in groups.items():
            task = progress.add_task(name, total=answers[name])
            found = exhaustive(
                competitors,
                cases,
                name,
                settings.max_tokens,
                settings.exhaustive,
                lambda task=task: progress.advance(task),  # type: ignore[misc]
            )
            result.trees[name] = found
            result.save(bench.path)
            console.print(
                f"{name}: chosen {found['choice']}, fastest {found['best']}", markup=False
            )


def _progress(console: Console) -> Progress:
    """Return a bar with a count and the time left, for terminals; nothing of it stays behind."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def prompt_line(asked: Sequence[AskedPrompt]) -> str:
    """Return a prompt's outcome in a line: each method's times as fast as mlx-lm."""
    parts = []
    for name in dict.fromkeys(run.method for one in asked for run in one.runs):
        runs = [run for one in asked for run in one.runs if run.method == name]
        base = [run for one in asked for run in one.runs if run.method == MLX_LM.label]
        if name == MLX_LM.label:
            continue
        ratio = _ratio(base, runs)
        bad = " DIFFERENT" if any(run.verdict == "different" for run in runs) else ""
        parts.append(f"{name} {ratio:.2f}x{bad}" if ratio else f"{name} –{bad}")
    title = asked[0].title
    short = title if len(title) <= 24 else title[:23] + "…"
    return f"{asked[0].category:<10} {short:<24}  {' · '.join(parts)}"


def _ratio(base: list[MethodRun], runs: list[MethodRun]) -> float | None:
    """Return the seconds per token of `base` over those of `runs`, None where there are none."""
    ours, theirs = sum(run.decode_s for run in runs), sum(run.decode_s for run in base)
    tokens, base_tokens = (sum(run.tokens - 1 for run in some) for some in (runs, base))
    if not (ours and theirs and tokens and base_tokens):
        return None
    return (theirs / base_tokens) / (ours / tokens)


def warnings_for(machine: Machine, load: float) -> list[str]:
    """Return what makes figures of this machine worth less, a sentence each."""
    found = []
    if machine.blas == REFERENCE_BLAS:
        found.append(
            "MLX computes with the reference BLAS here, which is slow and charges every row in "
            f"full, so that speculation cannot gain; {BLAS_ADVICE}."
        )
    elif machine.backend == "cpu":
        found.append("MLX runs on the CPU here; a GPU verifies several rows far more cheaply.")
    if load > 0.5:
        found.append(
            f"other programs were running (load {load:.1f} on {machine.cores} cores), so times "
            "are uncertain."
        )
    return found


def duration(seconds: float) -> str:
    """Return a time as people say it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
