"""The result of a benchmark as a JSON file: settings, machine, versions, and every single run.

    {"kind": "specstream-bench", "version": 1, "complete": true,
     "settings": {...}, "machine": {...}, "model": {...}, "cold": [run, ...],
     "asked": [{"category": "sql", "sha256": "...", "runs": [run, ...]}, ...]}

The file is replaced as a whole after every prompt, so an interrupted benchmark keeps what it has.
Reports and plots are made from this file alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DataError
from ..machine import Machine
from ..weights.files import atomic_file
from .methods import Method

KIND, VERSION = "specstream-bench", 1
RESULT_FILE = "result.json"

# What `competitors.described_model` writes and reports read.
_MODEL_FIELDS = {
    "name",
    "family",
    "dtype",
    "bits",
    "layers",
    "params",
    "layer_params",
    "head_params",
}
_MODEL_FIELDS |= {"weight_bytes", "used", "streams"}

D = TypeVar("D")


@dataclass(frozen=True)
class BenchSettings:
    """What a benchmark was asked to do: enough to do it again.

    sources: prompt files as given, or `built-in`. num_prompts: per category, drawn by `seed`.
    limit_s: stop after this many seconds, 0 for no limit. exhaustive: compare all trees of up to
    so many rows as well, 0 for none. turn_tokens: that a method decodes before the next has its
    turn, 0 for whole answers.
    """

    model: str
    adapter_path: str | None
    sources: list[str]
    categories: list[str]
    num_prompts: int | None
    max_tokens: int
    repeats: int
    seed: int
    draft_model: str | None
    limit_s: float
    exhaustive: int
    methods: list[Method]
    turn_tokens: int = 0


@dataclass(frozen=True)
class MethodRun:
    """One answer of one method. Times in seconds; what they span is said in `measure.py`.

    order: its turn among the methods. verdict: `identical` to the first answer of mlx-lm,
    `near-tie` (rounding in 16 bits), or `different`, at token `position`; note: the difference.
    """

    method: str
    repeat: int
    order: int
    prefill_s: float
    decode_s: float
    tokens: int
    passes: int
    drafted: int
    by_accepted: list[int]
    peak_bytes: int
    verdict: str = "identical"
    position: int = -1
    note: str = ""

    @property
    def token_s(self) -> float | None:
        """Return seconds per decoded token, None if there was only the first."""
        return self.decode_s / (self.tokens - 1) if self.tokens > 1 and self.decode_s else None


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt with the runs of all methods. turn: 0 for a conversation's first."""

    category: str
    title: str
    sha256: str
    turn: int
    prompt_tokens: int
    runs: list[MethodRun]


@dataclass
class Result:
    """A benchmark, complete or under way.

    model: what was loaded, its size and precision, and the streams by name. cold: each method's
    very first answer. notes: what a reader must know before believing the figures. ceilings:
    what the machine can do. plans: by streams, the planner's costs, forecasts and choice. trees:
    by category, every small tree as predicted and measured.
    """

    settings: BenchSettings
    machine: Machine
    model: dict[str, Any]
    started: str
    complete: bool = False
    finished: str = ""
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cold: list[MethodRun] = field(default_factory=list)
    asked: list[AskedPrompt] = field(default_factory=list)
    ceilings: dict[str, Any] | None = None
    plans: dict[str, Any] = field(default_factory=dict)
    trees: dict[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> list[tuple[AskedPrompt, MethodRun]]:
        """Return the runs of our methods whose output is not the reference's."""
        ours = {name for name, method in self.named_methods.items() if method.ours}
        return [
            (asked, run)
            for asked in self.asked
            for run in asked.runs
            if run.verdict == "different" and run.method in ours
        ]

    @property
    def named_methods(self) -> dict[str, Method]:
        from .methods import named

        return named(self.settings.methods)

    def save(self, path: Path) -> None:
        """Write the JSON file, replacing what is there."""
        values = {"kind": KIND, "version": VERSION, **asdict(self)}
        text = json.dumps(values, ensure_ascii=False, indent=1)
        with atomic_file(path, if_exists="replace") as partial:
            partial.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a JSON file that `save` wrote.

        Raises:
            DataError: it cannot be read, or is no result of this version.
        """
        what = f"{path} is no result of specstream bench"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}; name a result.json."
            ) from None
        except (ValueError, RecursionError):
            raise DataError(f"{what}: it is not valid JSON.") from None
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise DataError(f"{what}; name the result.json that it wrote.")
        if values.get("version") != VERSION:
            raise DataError(
                f"{path} has version {values.get('version')!r}, this program reads {VERSION}."
            )
        try:
            settings = dict(values["settings"])
            methods = [Method.from_dict(method) for method in settings.pop("methods")]
            result = cls(
                settings=_made(BenchSettings, {**settings, "methods": methods}),
                machine=Machine.from_dict(values["machine"]),
                model=dict(values["model"]),
                started=str(values["started"]),
                complete=bool(values["complete"]),
                finished=str(values["finished"]),
                left_out=[str(line) for line in values["left_out"]],
                notes=[str(line) for line in values["notes"]],
                cold=[_made(MethodRun, run) for run in values["cold"]],
                asked=[
                    _made(
                        AskedPrompt,
                        {**asked, "runs": [_made(MethodRun, run) for run in asked["runs"]]},
                    )
                    for asked in values["asked"]
                ],
                ceilings=values["ceilings"],
                plans=dict(values["plans"]),
                trees=dict(values["trees"]),
            )
            if missing := sorted(_MODEL_FIELDS - set(result.model)):
                raise KeyError(missing[0])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{what}: a field is missing or of the wrong kind ({error}).") from None
        return result


def _made(kind: type[D], values: dict[str, Any]) -> D:
    """Make a dataclass of its JSON form, whose fields must have the types of the default ones."""
    for name in (f.name for f in fields(kind)):  # type: ignore[arg-type]
        if name.endswith("_s") and not isinstance(values[name], int | float):
            raise TypeError(f"{name} is {values[name]!r}")
    return kind(**values)
