"""`specstream doctor --chips`: what the planner would do on Macs, predicted from records and published costs.

Recorded acceptance is replayed through the cost tables of Apple's chips (`prior.py`). Nothing it
prints was measured on a Mac. A Mac's owner can hold it to account:

    specstream bench --output run && specstream doctor --chips --compare run/result.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError
from ..planner.acceptance import ACCEPTANCE_FILE, AcceptanceProfile
from ..planner.choose import chosen, forecasts
from ..planner.curve import CostCurve
from ..planner.prior import CHIPS, SIZES, Chip, ModelSize, chip_named, chip_of, prior_curve
from ..planner.settings import candidates
from ..weights.shipped import SHIPPED, shipped_names

if TYPE_CHECKING:
    from ..bench.result import Result

BITS = (4, 8, 16, 32)
LABEL = "Predictions from published kernel figures, not measurements; nothing here ran on a Mac."


@dataclass(frozen=True)
class Prediction:
    """One chip, precision and task. plan: what the planner takes. tokens_per_s: with it."""

    chip: str
    bits: int
    size: str
    task: str
    plan: str
    tokens_per_step: float
    step_in_tokens: float
    speedup: float
    plain_tokens_per_s: float
    tokens_per_s: float


def predict(chip: Chip, bits: int, size: ModelSize, profile: AcceptanceProfile) -> list[Prediction]:
    """Return the planner's choice for each recorded task of `profile`."""
    # Grouped-query attention with up to four query heads a key head: no row count is slow.
    plans = candidates(
        profile.num_streams,
        "lossless",
        "deferred" if profile.deferred_only else "auto",
        prunable=profile.has_pruned,
        ends_known=profile.has_ends,
    )
    curve = prior_curve(chip, bits, size, profile.num_streams, plans)
    found = []
    for task in profile.tasks:
        best = chosen(forecasts(curve, profile.only(task)))
        found.append(
            Prediction(
                chip=chip.name,
                bits=bits,
                size=size.name,
                task=task,
                plan=best.name,
                tokens_per_step=best.tokens_per_step,
                step_in_tokens=best.seconds_per_step / curve.plain.seconds,
                speedup=best.speedup,
                plain_tokens_per_s=1 / curve.plain.seconds,
                tokens_per_s=best.tokens_per_s,
            )
        )
    return found


@dataclass(frozen=True)
class StepCompared:
    """A plan's cost in plain tokens, as a Mac measured it and as `prior.py` has it."""

    plan: str
    measured: float
    predicted: float


def compare_steps(curve: CostCurve, chip: Chip, bits: int, size: ModelSize) -> list[StepCompared]:
    """Compare a measured cost curve with the tables' for the same chip, bits and sizes."""
    plans = list(curve.steps)
    prior = prior_curve(chip, bits, size, curve.num_streams, plans)
    return [StepCompared(p.name, curve.relative(p), prior.relative(p)) for p in plans]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream doctor --chips`."""
    parser = argparse.ArgumentParser(
        prog="specstream doctor --chips",
        description=f"Predict tree and speed-up on Apple chips from recorded acceptance. {LABEL}",
    )
    parser.add_argument(
        "--streams",
        action="append",
        help="shipped set, stream folder or acceptance file to replay; may be repeated "
        "(default: all shipped sets)",
    )
    parser.add_argument(
        "--chip", action="append", help="as 'M4 Pro'; may be repeated (default: all)"
    )
    parser.add_argument(
        "--bits", type=int, action="append", choices=BITS, help="default: 4, 8 and 16"
    )
    parser.add_argument(
        "--size",
        choices=[size.name for size in SIZES],
        default="8B",
        help="model size (default: %(default)s)",
    )
    parser.add_argument(
        "--compare", metavar="FILE", help="a Mac's bench result: print predicted beside measured"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """Print predictions, or compare them with a measurement."""
    arguments = build_parser().parse_args(argv)
    if arguments.compare:
        return _compare(Path(arguments.compare).expanduser(), as_json=arguments.json)
    chips = _chips(arguments.chip)
    size = next(size for size in SIZES if size.name == arguments.size)
    found: list[tuple[str, Prediction]] = []
    for name, profile in _profiles(arguments.streams):
        for chip in chips:
            for bits in arguments.bits or BITS[:3]:
                found += [(name, one) for one in predict(chip, bits, size, profile)]
    if arguments.json:
        rows = [{"streams": name, **_rounded(vars(one))} for name, one in found]
        print(json.dumps({"kind": "predictions", "note": LABEL, "predictions": rows}))
    else:
        _print(found)
    return 0


def _print(found: Sequence[tuple[str, Prediction]]) -> None:
    from rich.console import Console
    from rich.table import Table

    tasks = list(dict.fromkeys((name, one.task) for name, one in found))
    title = f"Predicted speed-up and tree, {found[0][1].size} model"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("chip", "bits", "plain\ntok/s"):
        table.add_column(heading, justify="left" if heading == "chip" else "right")
    for _, task in tasks:
        table.add_column(task, justify="right")
    by_cell = {(one.chip, one.bits, name, one.task): one for name, one in found}
    for chip, bits in dict.fromkeys((one.chip, one.bits) for _, one in found):
        cells = [by_cell[chip, bits, name, task] for name, task in tasks]
        table.add_row(
            chip,
            str(bits),
            f"{cells[0].plain_tokens_per_s:.0f}",
            *("–" if one.plan == "plain" else f"{one.speedup:.2f} {one.plan}" for one in cells),
        )
    console = Console()
    console.print(table)
    told = "; ".join(f"{task}: {name}" for name, task in tasks)
    console.print(f"– is plain decoding. Streams of {told}.")
    console.print(LABEL, style="bold")


def _compare(path: Path, *, as_json: bool) -> int:
    """Print a bench result's measured step costs and speed-ups beside the predicted."""
    from ..bench.result import Result

    result = Result.load(path)
    chip = chip_of(result.machine)
    if chip is None:
        raise DataError(
            f"{path} was measured on {result.machine.chip or 'an unknown chip'}, for which there are "
            f"no published figures; there are for {', '.join(chip.name for chip in CHIPS)}."
        )
    size, bits = _size(result.model), _bits(result.model)
    steps, predicted = {}, []
    for streams, curve in _curves(path).items():
        steps[streams] = compare_steps(curve, chip, bits, size)
        for _, profile in _profiles([streams] if streams in shipped_names() else []):
            predicted += predict(chip, bits, size, profile)
    measured = measured_speeds(result)
    if as_json:
        record = {
            "chip": chip.name,
            "bits": bits,
            "steps": {name: [_rounded(vars(one)) for one in some] for name, some in steps.items()},
            "predicted": [_rounded(vars(one)) for one in predicted],
            "measured": measured,
        }
        print(json.dumps(record))
    else:
        _print_compared(chip, bits, steps, predicted, measured)
    return 0


def _print_compared(
    chip: Chip,
    bits: int,
    steps: Mapping[str, Sequence[StepCompared]],
    predicted: Sequence[Prediction],
    measured: Sequence[Mapping[str, Any]],
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for streams, some in steps.items():
        table = Table(title=f"A step in plain tokens, {chip.name}, {bits} bits, {streams}")
        for heading in ("plan", "measured", "predicted", "error"):
            table.add_column(heading, justify="left" if heading == "plan" else "right")
        for one in some:
            error = one.predicted / one.measured - 1
            table.add_row(one.plan, f"{one.measured:.2f}", f"{one.predicted:.2f}", f"{error:+.0%}")
        console.print(table)
    table = Table(title="Speed-up")
    for heading in ("of", "measured", "predicted"):
        table.add_column(heading)
    for speed in measured:
        table.add_row(f"{speed['category']}, {speed['method']}", f"{speed['speedup']:.2f}", "")
    for other in predicted:
        table.add_row(f"{other.task}, {other.plan}", "", f"{other.speedup:.2f}")
    console.print(table)


def measured_speeds(result: Result) -> list[dict[str, Any]]:
    """Return the measured speed-up of every category and method in a bench result."""
    from ..bench.summary import summarised

    return [
        {
            "category": line.category,
            "method": line.method,
            "speedup": round(line.speedup.median, 3),
            "tokens_per_step": round(line.tokens_per_step, 3),
        }
        for line in summarised(result)
    ]


def _curves(path: Path) -> dict[str, CostCurve]:
    """Return the measured cost curves in a bench result, by streams; there must be one."""
    plans = json.loads(path.read_text(encoding="utf-8")).get("plans") or {}
    try:
        curves = {name: CostCurve.from_dict(plan["curve"]) for name, plan in plans.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the cost curves in {path} cannot be read ({error}).") from None
    if not curves:
        raise DataError(
            f"{path} holds no cost curve, because no method in it plans its trees; run specstream "
            "bench with its own methods."
        )
    return curves


def _profiles(names: Sequence[str] | None) -> list[tuple[str, AcceptanceProfile]]:
    if names is None:
        places = [(name, SHIPPED / name / ACCEPTANCE_FILE) for name in shipped_names()]
        return [(name, AcceptanceProfile.load(path)) for name, path in places if path.is_file()]
    found = []
    for name in names:
        path = Path(name).expanduser()
        if name in shipped_names():
            path = SHIPPED / name
        if path.is_dir():
            path /= ACCEPTANCE_FILE
        found.append((Path(name).name, AcceptanceProfile.load(path)))
    return found


def _chips(names: Sequence[str] | None) -> list[Chip]:
    if names is None:
        return list(CHIPS)
    found = []
    for name in names:
        chip = chip_named(name)
        if chip is None:
            raise OptionError(
                f"there are no figures for the chip {name!r}; there are for "
                f"{', '.join(chip.name for chip in CHIPS)}."
            )
        found.append(chip)
    return found


def _size(model: Mapping[str, Any]) -> ModelSize:
    """Return the sizes of the model of a bench result."""
    try:
        layers = int(model["layers"])
        streams = next(iter(model["streams"].values()))
        return ModelSize(
            str(model["name"]),
            layers,
            float(layers * model["layer_params"]),
            float(model["head_params"]),
            int(streams["num_msa_layers"]),
        )
    except (KeyError, TypeError, ValueError, StopIteration, AttributeError) as error:
        raise DataError(f"the bench result does not describe its model ({error}).") from None


def _bits(model: Mapping[str, Any]) -> int:
    bits = model.get("bits")
    return bits if isinstance(bits, int) and not isinstance(bits, bool) else 16


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
