"""A benchmark's figures in words and tables: Markdown for a file, rich tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..machine.load import busy_sentence
from .methods import MLX_LM
from .result import Result
from .summary import ALL, ENOUGH, Line, summarised

if TYPE_CHECKING:
    from rich.console import Console

_METHOD = (
    "| category | method | prompts | tokens/s | speed-up | middle half | overall | tokens per pass "
    "| pass | first token | same output |"
)
_WHOLE = (
    "| method | prefill | first token, cold | tokens/s, cold | peak memory | passes | drafts "
    "accepted | passes with at least 1, 2, 3 ... drafts accepted |"
)


def markdown(result: Result, plots: Sequence[str] = ()) -> str:
    """Return the report as Markdown; `plots` are image files beside it."""
    lines = summarised(result)
    parts = [f"# {result.model['name']}: decoding compared", _about(result), *_warnings(result)]
    parts += [
        "## Speed\n\nSeconds per token of mlx-lm over the method's, per prompt: the median and the middle half of "
        "the prompts; overall weighs prompts by their tokens. Decoding only, from the first token to the last.",
        _table(_METHOD, [_row(line) for line in lines]),
        "## Prefill, memory, acceptance\n\nOver all prompts. Cold is a method's first answer after loading.",
        _table(_WHOLE, [_whole_row(result, line) for line in _all(lines)]),
    ]
    if result.plans:
        parts += ["## What the planner expects", *(_plan(n, p) for n, p in result.plans.items())]
    if result.trees:
        parts += ["## Every small tree: predicted and measured", *_trees(result)]
    if plots:
        parts.append("\n".join(f"![{name.partition('.')[0]}]({name})" for name in plots))
    return "\n\n".join(part for part in parts if part) + "\n"


def tree_lines(result: Result) -> list[str]:
    """Return a line per category on the planner's choice among all small trees."""
    lines = []
    for category, found in result.trees.items():
        within = sum(abs(row["error"]) <= 0.1 for row in found["rows"])
        same = all(row["identical"] for row in found["rows"])
        lines.append(
            f"{category}: the planner takes {found['choice']}, {found['choice_of_best']:.1%} of the "
            f"fastest, {found['best']}; {within} of {len(found['rows'])} predictions within 10 %; "
            f"{'all texts the same' if same else 'TEXTS DIFFER'}"
        )
    return lines


def show(result: Result, console: Console) -> None:
    """Print the figures to a terminal; fits 80 columns."""
    from rich.table import Table

    lines = summarised(result)
    table = Table(title="Decoding", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("tok/s", "speed-up", "middle half", "tok/pass", "same"):
        table.add_column(name, justify="right", no_wrap=True)
    for category in dict.fromkeys(line.category for line in lines):
        own = [line for line in lines if line.category == category]
        table.add_row(f"[bold]{_plain(category)}[/bold] ({own[0].prompts})")
        for line in own:
            base = line.method == MLX_LM.label
            table.add_row(
                f" {line.method}",
                f"{line.tokens_s:.1f}",
                "" if base else _colored(line.speedup.median),
                "" if base else _half(line),
                f"{line.tokens_per_step:.2f}",
                "" if base else _same(line),
            )
        table.add_section()
    console.print(table)
    whole = Table(
        title="\nAll prompts: prefill, memory, drafts",
        title_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    whole.add_column("", overflow="fold")
    for name in ("prefill tok/s", "first token", "cold", "peak", "accepted by depth"):
        whole.add_column(name, justify="right")
    for line in _all(lines):
        whole.add_row(
            line.method,
            f"{line.prefill_tokens_s:.0f}",
            _ms(line.first_token_s),
            _ms(_cold(result, line.method)[0]),
            _size(line.peak_bytes),
            " ".join(f"{share:.2f}"[1:] if share < 1 else "1" for share in line.accepted) or "–",
        )
    console.print(whole)
    for line_ in tree_lines(result):
        console.print(line_, soft_wrap=not console.is_terminal, markup=False)
    for warning in _warnings(result):
        console.print(f"\n{_plain(warning)}", soft_wrap=not console.is_terminal)


def headline(result: Result) -> str:
    """Return what came out, in a line: the best method overall, and where it loses.

    Fewer than `ENOUGH` prompts tell too little for that, and the line says so.
    """
    lines = summarised(result)
    prompts = max((line.prompts for line in _all(lines)), default=0)
    if prompts < ENOUGH:
        return f"{prompts} prompt{'s' * (prompts != 1)}: too few for a figure over all."
    ours = [line for line in _all(lines) if result.named_methods[line.method].kind == "streams"]
    if not ours:
        return ""
    best = max(ours, key=lambda line: line.overall)
    parts = [line for line in lines if line.method == best.method and line.category != ALL]
    low, high = (f(parts, key=lambda line: line.speedup.median) for f in (min, max))
    spread = (
        f"; from {low.speedup.median:.2f}x ({low.category}) to {high.speedup.median:.2f}x ({high.category})"
        if len(parts) > 1
        else ""
    )
    return f"{best.method}: {best.overall:.2f}x mlx-lm over all tokens{spread}."


def failure_lines(result: Result) -> list[str]:
    """Return a line per answer of ours that is not the reference's."""
    return [
        f"{run.method}, {asked.category} prompt {asked.title[:40]!r}: token {run.position} is {run.note}"
        for asked, run in result.failures
    ]


def _plan(streams: str, planned: dict[str, Any]) -> str:
    """Return the planner's table for one set of streams."""
    head = "| plan | rows | step | in plain tokens | expected tokens per step | expected speed-up |"
    plain = next(f["step_s"] for f in planned["forecasts"] if f["kind"] == "plain")
    rows = [
        [
            f"**{one['plan']}**" if one["plan"] == planned["chosen"] else one["plan"],
            str(one["rows"]),
            _ms(one["step_s"]),
            f"{one['step_s'] / plain:.2f}",
            f"{one['tokens_per_step']:.2f}",
            f"{one['speedup']:.2f}",
        ]
        for one in planned["forecasts"]
    ]
    return (
        f"{Path(streams).name}: begins with {planned['chosen']}. Costs: {planned['curve']['source']}; "
        f"acceptance: {planned['acceptance'] or 'recorded'}.\n\n{_table(head, rows)}"
    )


def _trees(result: Result) -> list[str]:
    head = (
        "| category | plan | measured tokens/s | predicted | error | tokens per step | expected |"
    )
    rows = [
        [
            category,
            row["plan"] + (" (chosen)" if row["plan"] == found["choice"] else ""),
            f"{row['measured_tokens_per_s']:.2f}",
            f"{row['predicted_tokens_per_s']:.2f}",
            f"{row['error']:+.1%}",
            f"{row['tokens_per_step']:.2f}",
            f"{row['expected_tokens_per_step']:.2f}",
        ]
        for category, found in result.trees.items()
        for row in sorted(found["rows"], key=lambda row: -row["measured_tokens_per_s"])
    ]
    return ["\n".join(f"* {line}" for line in tree_lines(result)), _table(head, rows)]


def _about(result: Result) -> str:
    machine, model, settings = result.machine, result.model, result.settings
    streams = "; ".join(
        f"{name} (γ = {one['num_streams']}, N_s = {one['num_msa_layers']}, {one['mode']})"
        for name, one in model["streams"].items()
    )
    sources = ", ".join(source.rpartition("/")[2] for source in settings.sources)
    count = len([asked for asked in result.asked if asked.turn == 0])
    facts = [
        f"model: {model['name']}, {model['family']}, {model['layers']} layers, {model['params'] / 1e6:.0f} M weights, "
        f"{model['bits']} bits, computing in {model['dtype']}",
        f"streams: {streams or 'none'}",
        *(f"{name}: streams {_short(used)}" for name, used in model["used"].items()),
        f"machine: {machine.summary}; {machine.chip}, {machine.memory_bytes / 2**30:.0f} GB",
        f"versions: mlx-specstream {machine.mlx_specstream}, {machine.versions}, {machine.system} {machine.os_version}",
        f"prompts: {count} of {sources}; at most {settings.max_tokens} tokens, greedy, repeats {settings.repeats}, "
        f"seed {settings.seed}, "
        + (
            f"in turns of {settings.turn_tokens} tokens"
            if settings.turn_tokens
            else "answer by answer"
        ),
        f"when: {result.started} to {result.finished or 'not finished'}",
        *(f"left out: {line}" for line in result.left_out),
    ]
    return "\n".join(f"* {fact}" for fact in facts)


def _warnings(result: Result) -> list[str]:
    failed = failure_lines(result)
    lines = [f"**Different output**, a failure: {line}" for line in failed]
    ties = sum(run.verdict == "near-tie" for asked in result.asked for run in asked.runs)
    if ties:
        lines.append(
            f"{ties} answers part from mlx-lm's at a near-tie of two tokens, which is rounding."
        )
    busy = busy_sentence(result.other_cores, result.machine.cores)
    return [*lines, *(f"Note: {note}" for note in [*result.notes, busy] if note)]


def _row(line: Line) -> list[str]:
    return [
        line.category,
        line.method,
        str(line.prompts),
        f"{line.tokens_s:.1f}",
        f"{line.speedup.median:.2f}",
        _half(line),
        f"{line.overall:.2f}",
        f"{line.tokens_per_step:.2f}",
        _ms(line.step_s),
        _ms(line.first_token_s),
        _same(line),
    ]


def _whole_row(result: Result, line: Line) -> list[str]:
    first, speed = _cold(result, line.method)
    return [
        line.method,
        f"{line.prefill_tokens_s:.0f} tokens/s",
        _ms(first),
        f"{speed:.1f}" if speed else "–",
        _size(line.peak_bytes),
        str(sum(r.passes for a in result.asked for r in a.runs if r.method == line.method)),
        f"{line.acceptance:.0%}" if line.acceptance else "–",
        " ".join(f"{share:.2f}" for share in line.accepted) or "–",
    ]


def _cold(result: Result, method: str) -> tuple[float | None, float | None]:
    """Return a method's first seconds to the first token, and tokens per second."""
    run = next((run for run in result.cold if run.method == method), None)
    if run is None:
        return None, None
    return run.prefill_s, 1 / run.token_s if run.token_s else None


def _all(lines: Sequence[Line]) -> list[Line]:
    """Return the lines over all categories."""
    whole = [line for line in lines if line.category == ALL]
    return whole or list(lines)


def _table(head: str, rows: Sequence[Sequence[str]]) -> str:
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([head, rule, *(f"| {' | '.join(row)} |" for row in rows)])


def _same(line: Line) -> str:
    text = f"{line.identical}/{line.runs}"
    return f"{text} ✗" if line.different else f"{text} ≈" if line.near_ties else text


def _half(line: Line) -> str:
    """Return the middle half of the prompts, which a single one does not have."""
    if line.prompts < 2:
        return "–"
    return f"{line.speedup.low:.2f}–{line.speedup.high:.2f}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def _short(streams: str) -> str:
    """Return the names of streams without the folders they are in."""
    return ", ".join(
        f"{category}{equals}{Path(name).name}"
        for category, equals, name in (
            ("", "", word) if "=" not in word else word.partition("=")
            for word in streams.split(",")
        )
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _colored(ratio: float) -> str:
    color = "green" if ratio >= 1.02 else "red" if ratio < 0.98 else "default"
    return f"[{color}]{ratio:.2f}x[/{color}]"


def _plain(text: str) -> str:
    return text.replace("[", r"\[").replace("**", "")
