"""`specstream doctor`: the machine, what is wrong with it, what it can run, and what to change.

Exit status 1 if something keeps models from running.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..doctor.expected import LABEL, Expectation, expected
from ..doctor.finding import Finding, problem
from ..doctor.findings import findings
from ..doctor.sizes import CONTEXT, TYPICAL, Shape, read_shape, supported, usable_bytes
from ..errors import DataError
from ..machine import Machine

if TYPE_CHECKING:
    from rich.console import Console

BITS = (4, 8, 16)
_PREDICTED = ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B")
_MARKS = {"problem": "[red]✗[/red]", "advice": "[yellow]![/yellow]", "fact": "[dim]·[/dim]"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream doctor`."""
    parser = argparse.ArgumentParser(
        prog="specstream doctor",
        description="Say what this machine can run, what is wrong with it, and what to change.",
    )
    parser.add_argument(
        "--model",
        help="also look at a model: a folder, 'demo', or a hub id, of which only config.json is read",
    )
    parser.add_argument(
        "--machine", metavar="FILE", help="diagnose another machine, from the --json it printed"
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="run doctor, verify and bench --quick (some minutes) and write one file for an issue",
    )
    parser.add_argument(
        "--families",
        action="store_true",
        help="list mlx-lm's model families, and which are refused",
    )
    parser.add_argument(
        "--chips",
        action="store_true",
        help="predict trees and speed-ups on Apple's chips; its own options: doctor --chips --help",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def parser_for(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser that reads these words: --chips has options of its own."""
    if "--chips" not in argv:
        return build_parser()
    from ..doctor import chips

    parser = chips.build_parser()
    parser.add_argument("--chips", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> int:
    """Examine the machine and print what was found."""
    if "--chips" in argv:
        from ..doctor import chips

        return chips.main([word for word in argv if word != "--chips"])
    arguments = build_parser().parse_args(argv)
    if arguments.families:
        from ..doctor.families import show_families

        return show_families(as_json=arguments.json)
    if arguments.report:
        from ..doctor.report import write_report

        return write_report(Path(arguments.report).expanduser(), arguments.model)
    machine = read_machine(arguments.machine) if arguments.machine else Machine.read()
    shape = _shape(arguments.model) if arguments.model else None
    found = findings(machine)
    if shape is not None:
        found += model_findings(machine, shape)
    if arguments.json:
        print(json.dumps(record(machine, found, shape), ensure_ascii=False, indent=1))
    else:
        from rich.console import Console

        show(Console(highlight=False), machine, found, shape)
    return 1 if any(finding.level == "problem" for finding in found) else 0


def read_machine(path: str) -> Machine:
    """Read a machine that `specstream doctor --json` described.

    Raises:
        DataError: the file cannot be read or describes none.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        values = None
    inner = values.get("machine") if isinstance(values, dict) else None
    if not isinstance(inner, dict):
        raise DataError(f"{path} describes no machine; name what specstream doctor --json printed.")
    return Machine.from_dict(inner)


def _shape(name: str) -> Shape:
    """Return the size of a model that is named on the command line."""
    from ..loading.folders import is_built_in, model_folder

    if is_built_in(name):
        return replace(read_shape(str(model_folder(name))), name=name)
    return read_shape(name)


def model_findings(machine: Machine, shape: Shape) -> list[Finding]:
    """Return what is to be said of one model on this machine."""
    found = []
    if not supported(shape):
        found.append(
            problem(
                f"models of type {shape.family or '?'} are not supported yet",
                "their layers have not been shown to compute the same through our view",
                "decode it with mlx-lm itself",
            )
        )
    room = usable_bytes(machine)
    bits = shape.bits or 16
    if room and shape.needed_bytes(bits) > room:
        smaller = [b for b in BITS if b < bits and shape.needed_bytes(b) <= room]
        found.append(
            problem(
                f"{shape.name} in {bits} bits takes {_gb(shape.needed_bytes(bits))} with {CONTEXT} "
                f"tokens of context, and {_gb(room)} can be used here",
                "what does not fit is paged out, and decoding becomes many times slower",
                f"take it in {max(smaller)} bits" if smaller else "take a smaller model",
            )
        )
    return found


def record(machine: Machine, found: Sequence[Finding], shape: Shape | None) -> dict[str, Any]:
    """Return what --json prints."""
    room = usable_bytes(machine)
    shapes = [*TYPICAL, *([shape] if shape is not None else [])]
    return {
        "machine": machine.to_dict(),
        "usable_bytes": room,
        "findings": [finding.to_dict() for finding in found],
        "models": [
            {
                "name": one.name,
                "params": one.num_params,
                "supported": supported(one),
                "stored_bits": one.bits or None,
                "fits": {
                    str(bits): {
                        "bytes": one.needed_bytes(bits),
                        "fits": one.needed_bytes(bits) <= room,
                    }
                    for bits in BITS
                },
            }
            for one in shapes
        ],
        "expected": [one.to_dict() for one in expectations(machine, shape)],
    }


def show(console: Console, machine: Machine, found: Sequence[Finding], shape: Shape | None) -> None:
    """Print the diagnosis."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    def say(text: str, indent: int = 0, style: str = "") -> None:
        console.print(Padding(Text(text, style), (0, 0, 0, indent)))

    room = usable_bytes(machine)
    memory = (
        f"{machine.memory_bytes / 2**30:.0f} GB memory"
        if machine.memory_bytes
        else "memory unknown"
    )
    say(f"{machine.chip or 'unknown chip'}, {machine.cores} cores, {memory}")
    backend = {"metal": "on the GPU (Metal)", "cuda": "on the GPU (CUDA)", "cpu": "on the CPU"}
    computes = backend.get(machine.backend, "not at all")
    blas = f", {machine.blas}" if machine.blas else ""
    system = "macOS" if machine.system == "Darwin" else machine.system or "unknown system"
    say(f"{system} {machine.os_version}; MLX computes {computes}{blas}")
    say(f"{machine.versions}, mlx-specstream {machine.mlx_specstream}")
    if machine.gpu:
        say(f"{machine.gpu}; {_gb(room)} of memory can hold models")
    for finding in found:
        console.print()
        mark = _MARKS[finding.level]
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_row(mark, Text(finding.what, "bold"))
        console.print(line)
        say(f"why: {finding.why}", 2)
        say(f"do:  {finding.do}", 2)
        if finding.source:
            say(finding.source, 2, "dim")
    if not any(finding.level == "problem" for finding in found):
        console.print("\n[green]✓[/green] Nothing keeps models from running here.")
    table = Table(
        title=f"What fits, with {CONTEXT} tokens of context",
        title_justify="left",
        show_edge=False,
    )
    table.add_column("model")
    for bits in BITS:
        table.add_column(f"{bits}-bit", justify="right")
    for one in [*TYPICAL, *([shape] if shape is not None else [])]:
        cells = [_cell(one.needed_bytes(bits), room) for bits in BITS]
        table.add_row(f"[bold]{one.name}[/bold]" if one is shape else one.name, *cells)
    console.print()
    console.print(table)
    show_expected(console, expectations(machine, shape))
    console.print("\nMeasure what speculation gains here: specstream bench --quick")


def expectations(machine: Machine, shape: Shape | None) -> list[Expectation]:
    """Return predictions for models that fit: the one asked about, else some typical ones."""
    room = usable_bytes(machine)
    shapes = [shape] if shape is not None else [s for s in TYPICAL if s.name in _PREDICTED]
    every = [
        expected(machine, one, bits)
        for one in shapes
        for bits in ((one.bits,) if one.bits in BITS else BITS)
        if one.needed_bytes(bits) <= room
    ]
    return [one for one in every if one is not None]


def show_expected(console: Console, found: Sequence[Expectation]) -> None:
    """Print predictions as a table, labelled as what they are."""
    from rich.table import Table

    if not found:
        return
    table = Table(title="Expected, a prediction", title_justify="left", show_edge=False)
    tasks = list(dict.fromkeys(task for one in found for task in one.by_task))
    for name in ("model", "bits", "plain tok/s", *tasks):
        table.add_column(name, justify="left" if name == "model" else "right")
    for one in found:
        cells = [f"{one.by_task[task][1]:.2f}x" for task in tasks]
        table.add_row(one.model, str(one.bits), f"{one.plain_tokens_s:.0f}", *cells)
    console.print()
    console.print(table)
    console.print(LABEL)


def _cell(needed: int, room: int) -> str:
    if not room:
        return _gb(needed)
    return f"[green]{_gb(needed)} ✓[/green]" if needed <= room else f"[red]{_gb(needed)} ✗[/red]"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count else "unknown"
