"""The scaling study: what a step costs, and what it gives, as one thing grows at a time.

    python -m benchmarks.scaling context tree streams msa vocab size   step times
    python -m benchmarks.scaling yield-tree yield-context              tokens per pass
    python -m benchmarks.scaling long                                  memory, 20,000 tokens

Every study says how long it will take, then measures point by point; `scaling.json` is written
after each, and `scaling.md` and plots at the end. A study that is in the folder already is measured
again, the others are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import scaling_report
from benchmarks.endurance import ALLOWED_BYTES, growth_bytes, long_generation, small_model
from benchmarks.studies import STEP_STUDIES, TINY, made, run_study, say, studies
from benchmarks.yields import yield_points
from mlx_specstream.bench.run import now
from mlx_specstream.bench.session import duration, warnings_for
from mlx_specstream.errors import DataError, OptionError, StreamsError
from mlx_specstream.exit_status import exit_status
from mlx_specstream.loading.folders import model_folder
from mlx_specstream.loading.load import StreamModel, load
from mlx_specstream.machine import Machine
from mlx_specstream.speculation.streams import Streams
from mlx_specstream.weights.files import atomic_file

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

YIELD_STUDIES = ("yield-tree", "yield-context")
LONG = "long"
KIND = "specstream-scaling"


def build_parser() -> argparse.ArgumentParser:
    """Return the options of `python -m benchmarks.scaling`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Measure what a step costs and gives as one thing grows at a time.",
    )
    parser.add_argument(
        "study", nargs="*", metavar="STUDY", help=", ".join((*STEP_STUDIES, *YIELD_STUDIES, LONG))
    )
    parser.add_argument("--model", default="demo", help="model of contexts, trees and yields")
    parser.add_argument("--streams", default="auto", help="its streams")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps a point")
    parser.add_argument("--num-prompts", type=int, default=6, help="prompts a point of a yield")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens of an answer there")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of the long generation")
    parser.add_argument("--limit", type=float, default=20.0, help="most minutes a study")
    parser.add_argument("--small", action="store_true", help="tiny sizes: only to see it work")
    parser.add_argument("--output", default="specstream-scaling", help="folder for the results")
    parser.add_argument("--from", dest="source", metavar="JSON", help="only draw its results again")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies and write `scaling.json`, `scaling.md` and plots; 1 if memory grew."""
    arguments = build_parser().parse_args(argv)
    folder = Path(arguments.output).expanduser()
    if arguments.source:
        path = Path(arguments.source).expanduser()
        record = read_record(path)
        return finish(record, folder if arguments.output != "specstream-scaling" else path.parent)
    check(arguments)
    machine = Machine.read()
    earlier = folder / "scaling.json"
    record = {
        "kind": KIND,
        "started": now(),
        "machine": machine.to_dict(),
        "model": Path(arguments.model).name,
        "rounds": arguments.rounds,
        "studies": read_record(earlier)["studies"] if earlier.exists() else {},
    }
    for note in warnings_for(machine):
        say(f"note: {note}")
    loader = _Loader(arguments)
    for study in studies(
        [name for name in STEP_STUDIES if name in arguments.study], loader.streams, arguments.small
    ):
        points = run_study(study, arguments.rounds, 60 * arguments.limit)
        collect(record, folder, study.name, study.grows, points)
    for name in (name for name in YIELD_STUDIES if name in arguments.study):
        model, tokenizer = loader.loaded()
        points = yield_points(
            name, model, tokenizer, arguments.num_prompts, arguments.max_tokens, arguments.small
        )
        grows = "rows of the tree" if name == "yield-tree" else "tokens of context"
        collect(record, folder, name, grows, points, 60 * arguments.limit)
    if LONG in arguments.study:
        tokenizer = loader.tokenizer()
        model = small_model(max(tokenizer.get_vocab().values()) + 1)
        samples = long_generation(model, tokenizer, arguments.tokens)
        collect(record, folder, LONG, "tokens generated", samples)
    return finish(record, folder)


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that make no sense.

    Raises:
        OptionError: a study is not known, or a number is out of range.
    """
    known = (*STEP_STUDIES, *YIELD_STUDIES, LONG)
    unknown = [name for name in arguments.study if name not in known]
    if unknown or not arguments.study:
        raise OptionError(
            (f"there is no study {unknown[0]!r}" if unknown else "no study is named")
            + f"; name some of {', '.join(known)}."
        )
    for name, least in (("rounds", 2), ("num_prompts", 1), ("max_tokens", 2), ("tokens", 100)):
        if getattr(arguments, name) < least:
            raise OptionError(f"--{name.replace('_', '-')} must be at least {least}.")


class _Loader:
    """Loads the model with its streams when a study first asks for it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.found: tuple[StreamModel, TokenizerWrapper] | None = None

    def loaded(self) -> tuple[StreamModel, TokenizerWrapper]:
        if self.found is None:
            name = self.arguments.model
            model, tokenizer = load(name, streams=self.arguments.streams)
            if model.streams is None:
                raise StreamsError(f"there are no streams for {name}; name some with --streams.")
            self.found = (model, tokenizer)
        return self.found

    def tokenizer(self) -> TokenizerWrapper:
        """Return the tokenizer alone, so that the model's weights are not in memory."""
        from mlx_lm.utils import load_tokenizer

        self.found = None
        folder = model_folder(self.arguments.model)
        return load_tokenizer(folder, {"trust_remote_code": False})

    def streams(self) -> Streams:
        if self.arguments.small:
            return made(TINY, 32, 4, 2)()
        streams = self.loaded()[0].streams
        assert streams is not None
        return streams


def collect(
    record: dict[str, Any],
    folder: Path,
    name: str,
    grows: str,
    points: Iterator[dict[str, Any]],
    limit_s: float = 0.0,
) -> None:
    """Take in a study's points as they come, writing the file after each; stop at the limit."""
    found: list[dict[str, Any]] = []
    record["studies"][name] = {"grows": grows, "when": now(), "points": found}
    begun = time.perf_counter()
    for point in points:
        found.append(point)
        write(record, folder)
        spent = time.perf_counter() - begun
        say(f"{name}: {scaling_report.line(point)} ({duration(spent)} so far)")
        if limit_s and spent > limit_s:
            say(f"{name}: stopped after {duration(limit_s)}")
            return


def write(record: dict[str, Any], folder: Path) -> None:
    """Write what there is so far."""
    with atomic_file(folder / "scaling.json", if_exists="replace") as partial:
        partial.write_text(
            json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )


def read_record(path: Path) -> dict[str, Any]:
    """Read what an earlier run wrote.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise DataError(f"{path} is no result of the scaling study; name its scaling.json.")
    return record


def finish(record: dict[str, Any], folder: Path) -> int:
    """Write the report and plots, say where they are, and return the exit status."""
    write(record, folder)
    text = scaling_report.markdown(record)
    plots = scaling_report.write_plots(record, folder)
    text += "".join(f"\n![{name.partition('.')[0]}]({name})\n" for name in plots)
    with atomic_file(folder / "scaling.md", if_exists="replace") as partial:
        partial.write_text(text, encoding="utf-8")
    print(text)
    say(f"written to {folder}: {', '.join(['scaling.json', 'scaling.md', *plots])}")
    long = record["studies"].get(LONG)
    if long and growth_bytes(long["points"]) > ALLOWED_BYTES:
        say(f"memory grew by {growth_bytes(long['points']) / 1e6:.1f} MB beyond the KV cache")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, "scaling"))
