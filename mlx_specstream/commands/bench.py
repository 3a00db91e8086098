"""`specstream bench`: what speculation gains on this machine, prompt by prompt, against mlx-lm itself.

A folder holds the result: `result.json` (every run, and all it takes to repeat them), `report.md`
and plots. Exit status 1 if an answer of ours is not mlx-lm's (beyond rounding in 16 bits).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.cases import Case, chosen_cases
from ..bench.options import build_parser, settings_of
from ..bench.result import RESULT_FILE, BenchSettings, Result
from ..errors import DataError, OptionError, OutputError
from ..machine import Machine

if TYPE_CHECKING:
    from rich.console import Console

REPORT_FILE = "report.md"


def main(argv: list[str]) -> int:
    """Measure, write the result and its report, and print them."""
    arguments = build_parser().parse_args(argv)
    if sum(map(bool, (arguments.resume, arguments.rerun, arguments.source))) > 1:
        raise OptionError("--resume, --rerun and --from exclude each other; name one of them.")

    from rich.console import Console

    console = Console(highlight=False)
    if arguments.source:
        path = result_path(arguments.source)
        result = Result.load(path)
        folder = Path(arguments.output).expanduser() if arguments.output else path.parent
        return finish(result, folder, console, plots=not arguments.no_plots)
    if arguments.resume:
        path = result_path(arguments.resume)
        result = Result.load(path)
        if result.complete:
            raise OptionError(f"{path} is complete; measure again with --rerun.")
    else:
        earlier = Result.load(result_path(arguments.rerun)) if arguments.rerun else None
        settings = earlier.settings if earlier else settings_of(arguments)
        path = new_folder(arguments.output, settings.model) / RESULT_FILE
        result = Result(settings, Machine.read(), {}, "")
    cases = cases_of(result.settings)
    if arguments.rerun and earlier is not None:
        check_same_prompts(earlier, cases)

    from ..bench.session import measured

    try:
        measured(result, cases, path, console, resumed=bool(arguments.resume))
    except KeyboardInterrupt:
        if result.asked:
            console.print(
                f"\nInterrupted; {len(result.asked)} prompts are kept. Go on with:\n"
                f"  specstream bench --resume {path}",
                soft_wrap=not console.is_terminal,
            )
        raise
    return finish(result, path.parent, console, plots=not arguments.no_plots)


def finish(result: Result, folder: Path, console: Console, *, plots: bool) -> int:
    """Write report and plots, print the figures, and return the exit status."""
    from ..bench.plot_style import MISSING, available
    from ..bench.plots import write_plots
    from ..bench.report import headline, markdown, show
    from ..weights.files import atomic_file

    if not result.asked:
        raise DataError("the result holds no prompt yet; measure first.")
    written: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    if plots and available():
        written = write_plots(result, folder)
    with atomic_file(folder / REPORT_FILE, if_exists="replace") as partial:
        partial.write_text(markdown(result, written), encoding="utf-8")
    show(result, console)
    if line := headline(result):
        console.print(f"\n{line}", soft_wrap=not console.is_terminal)
    if plots and not available():
        console.print(MISSING, soft_wrap=not console.is_terminal, markup=False)
    if result.left_out:
        console.print(
            "Left out: " + "; ".join(result.left_out),
            soft_wrap=not console.is_terminal,
            markup=False,
        )
    console.print(
        f"Written to {folder}: {', '.join([RESULT_FILE, REPORT_FILE, *written])}",
        soft_wrap=not console.is_terminal,
    )
    return 1 if result.failures else 0


def cases_of(settings: BenchSettings) -> list[Case]:
    """Return the prompts that the settings ask for."""
    return chosen_cases(
        settings.sources,
        settings.categories,
        settings.num_prompts,
        settings.seed,
        in_turns=settings.limit_s > 0,
    )


def check_same_prompts(earlier: Result, cases: Sequence[Case]) -> None:
    """Make sure that the files still hold the prompts that an earlier result was measured on.

    Raises:
        DataError: a prompt is gone.
    """
    here = {case.sha256 for case in cases}
    gone = [asked for asked in earlier.asked if asked.sha256 not in here]
    if gone:
        raise DataError(
            f"{len(gone)} prompts of the earlier benchmark are no longer in "
            f"{', '.join(earlier.settings.sources)} (the first: {gone[0].title[:40]!r}); use the "
            "files it was made with."
        )


def new_folder(output: str | None, model: str) -> Path:
    """Return the folder for a new result; a result that is there is left alone.

    Raises:
        OutputError: the folder holds a result.
    """
    from ..bench.run import now

    if output is None:
        name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-.") or "model"
        stamp = re.sub(r"\D", "", now()[:19])
        return Path("specstream-bench") / f"{name}-{stamp[:8]}-{stamp[8:]}"
    folder = Path(output).expanduser()
    if (folder / RESULT_FILE).exists():
        raise OutputError(
            f"{folder / RESULT_FILE} exists already; go on with --resume, measure again with "
            "--rerun and another --output, or name another folder."
        )
    return folder


def result_path(text: str) -> Path:
    """Return the result's file, which may be named by its folder."""
    path = Path(text).expanduser()
    return path / RESULT_FILE if path.is_dir() else path
