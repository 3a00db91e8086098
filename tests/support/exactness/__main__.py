"""`python -m tests.support.exactness`: draw cases, play them, count what was found."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from mlx_specstream import __version__
from mlx_specstream.errors import OptionError
from mlx_specstream.exit_status import exit_status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.exactness",
        description="Compare speculation with mlx-lm's decoding on random tiny cases.",
    )
    parser.add_argument("--cases", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the run (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--families", nargs="+", help="mlx-lm modules to draw from (default: all supported ones)"
    )
    parser.add_argument(
        "--mode",
        choices=("lossless", "shared"),
        default="lossless",
        help="of the streams; shared ones are compared with a token per pass (default: %(default)s)",
    )
    parser.add_argument(
        "--batches",
        type=float,
        default=0.35,
        help="share of cases played in batches, of those that can be (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the counts, written as it goes")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    return parser


def main(argv: list[str]) -> int:
    """Play the cases; 1 if one does not match mlx-lm."""
    arguments = build_parser().parse_args(argv)
    if arguments.cases < 1:
        raise OptionError(f"--cases must be at least 1, got {arguments.cases}.")

    from tests.support.exactness.compare import Outcome
    from tests.support.exactness.draw import draw_case
    from tests.support.exactness.models import supported_families
    from tests.support.exactness.play import NotComputedError, play
    from tests.support.exactness.tally import Tally

    families = arguments.families or supported_families(arguments.mode)
    print(f"{len(families)} families: {', '.join(families)}", flush=True)
    tally, started = Tally(), time.monotonic()
    run: dict[str, object] = {
        "command": f"python -m tests.support.exactness {' '.join(argv)}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "mlx-specstream": __version__,
            "mlx": version("mlx"),
            "mlx-lm": version("mlx-lm"),
        },
        "python": platform.python_version(),
        "seed": arguments.seed,
        "first": arguments.first,
    }
    for number in range(arguments.first, arguments.first + arguments.cases):
        case = draw_case(arguments.seed, number, families, arguments.mode, arguments.batches)
        try:
            tally.add(play(case))
        except NotComputedError:
            tally.left_out += 1
        except Exception as error:  # whatever is raised is a finding, and the run goes on
            tally.add(Outcome(case, "mismatch", 0, 0, f"{type(error).__name__}: {error}"))
        minutes = (time.monotonic() - started) / 60
        over = arguments.minutes is not None and minutes > arguments.minutes
        if arguments.out is not None and (tally.cases % 100 == 0 or over):
            tally.write(arguments.out, {**run, "minutes": round(minutes, 1)})
        if over:
            break
    if arguments.out is not None:
        minutes = (time.monotonic() - started) / 60
        tally.write(arguments.out, {**run, "minutes": round(minutes, 1)})
    print(tally)
    return 1 if tally.mismatches else 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), "exactness"))
