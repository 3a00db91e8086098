"""What was accepted where: records from which the yield of any tree can be read off.

The records themselves are in `trace.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from ..errors import DataError
from ..weights.files import atomic_file
from ..weights.shipped import SHIPPED
from .settings import StepSetting
from .trace import AnswerTrace, read, written

ACCEPTANCE_FILE = "acceptance.json"
VERSION = 1
RECORDED_ROWS = 64


@dataclass(frozen=True)
class Rates:
    """How often the token at each depth is accepted, given that all above it were."""

    chances: tuple[float, ...]

    @classmethod
    def of(cls, steps: Iterable[int], depth: int) -> Rates:
        """Count the accepted drafts of steps with trees `depth` deep; one miss in two is assumed."""
        tried, right = [0.0] * depth, [0.0] * depth
        for accepted in steps:
            for level in range(min(accepted + 1, depth)):
                tried[level] += 1
                right[level] += level < accepted
        # Half a hit in one more trial: a depth nobody reached says nothing sure.
        return cls(tuple((r + 0.25) / (t + 0.5) for r, t in zip(right, tried, strict=True)))

    def tokens_per_step(self) -> float:
        """Return 1 + the expected accepted drafts."""
        tokens = reached = 1.0
        for chance in self.chances:
            reached *= chance
            tokens += reached
        return tokens


@dataclass(frozen=True, eq=False)
class AcceptanceProfile:
    """Recorded answers of one set of streams, and what any plan would yield on them.

    Compared by identity: what is read off it is kept for as long as it lives.

    source: what was recorded, in words. deferred_only: whether these streams know the next token
    and so never run inline.
    """

    num_streams: int
    answers: tuple[AnswerTrace, ...]
    conditioned: bool = False
    source: str = ""
    deferred_only: bool = False

    @property
    def tasks(self) -> list[str]:
        """Return the names of the recorded tasks, in order of their first answer."""
        return list(dict.fromkeys(answer.task for answer in self.answers))

    @property
    def num_positions(self) -> int:
        """Return how many tokens were recorded."""
        return sum(len(answer.positions) for answer in self.answers)

    @property
    def has_pruned(self) -> bool:
        """Tell whether it is recorded what an early exit would leave of trees."""
        return any(p.pruned for answer in self.answers for p in answer.positions)

    @property
    def has_ends(self) -> bool:
        """Tell whether it is recorded which nodes would get streams inline."""
        return any(p.ends for answer in self.answers for p in answer.positions)

    def only(self, task: str) -> AcceptanceProfile:
        """Return the records of one task alone.

        Raises:
            DataError: there are none.
        """
        answers = tuple(answer for answer in self.answers if answer.task == task)
        if not answers:
            raise DataError(
                f"no answers of the task {task!r} were recorded; there are "
                f"{', '.join(self.tasks) or 'none'}."
            )
        return replace(self, answers=answers)

    def walk(self, plan: StepSetting) -> list[int]:
        """Return the accepted drafts of every step of every answer."""
        return [n for answer in self.answers for n in answer.walk(plan, self.num_streams)]

    def rates(self, plan: StepSetting) -> Rates:
        """Return how often each depth of the plan's tree is accepted."""
        return _rates(self, plan)

    def tokens_per_step(self, plan: StepSetting) -> float:
        """Return the expected tokens per step; see `Rates.tokens_per_step`."""
        return self.rates(plan).tokens_per_step()

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form; see `trace.written`."""
        return {
            "version": VERSION,
            "num_streams": self.num_streams,
            "conditioned": self.conditioned,
            "source": self.source,
            "deferred_only": self.deferred_only,
            "answers": [
                {"task": answer.task, **written(answer.positions)} for answer in self.answers
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> AcceptanceProfile:
        """Make one from its JSON form.

        Raises:
            DataError: it is of another version, or damaged.
        """
        try:
            if values["version"] != VERSION:
                raise ValueError(f"version {values['version']!r}")
            answers = values["answers"]
            assert isinstance(answers, list)
            return cls(
                num_streams=int(str(values["num_streams"])),
                answers=tuple(AnswerTrace(read(a), str(a["task"])) for a in answers),
                conditioned=bool(values.get("conditioned", False)),
                source=str(values.get("source", "")),
                deferred_only=bool(values.get("deferred_only", False)),
            )
        except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
            raise DataError(
                f"the acceptance records cannot be read ({error}); record them again with "
                "specstream plan --record."
            ) from None

    def save(self, path: Path) -> None:
        """Write the JSON form to `path`, replacing what is there.

        Raises:
            OutputError: it cannot be written.
        """
        with atomic_file(path, if_exists="replace") as partial:
            text = json.dumps(self.to_dict(), indent=0, separators=(",", ":"), ensure_ascii=False)
            partial.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> AcceptanceProfile:
        """Read the JSON form.

        Raises:
            DataError: there is no such file, or it is damaged.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"the acceptance records in {path} cannot be read ({error}); record them again "
                "with specstream plan --record."
            ) from None
        if not isinstance(values, dict):
            raise DataError(f"{path} holds no acceptance records; name another file.")
        return cls.from_dict(values)


def profile_of(streams_folder: str | Path | None) -> AcceptanceProfile | None:
    """Return what was recorded with the streams in a folder; None if nothing was, or it is damaged."""
    if not streams_folder:
        return None
    path = Path(streams_folder) / ACCEPTANCE_FILE
    try:
        return AcceptanceProfile.load(path) if path.is_file() else None
    except DataError:
        return None


@lru_cache(maxsize=16)
def assumed_profile(num_streams: int) -> AcceptanceProfile:
    """Return records to begin with for streams that have none: those of the demo's chat streams.

    Text and streams at hand will differ; the planner soon follows what it sees of them.
    """
    known = AcceptanceProfile.load(SHIPPED / "demo-chat" / ACCEPTANCE_FILE)
    return AcceptanceProfile(num_streams, known.answers, known.conditioned, "assumed, as demo-chat")


@lru_cache(maxsize=1024)
def _rates(profile: AcceptanceProfile, plan: StepSetting) -> Rates:
    return Rates.of(profile.walk(plan), plan.depth(profile.num_streams))
