"""Where an adoption stands: what was asked, what is done and how long it took.

CACHE/adopt/NAME-PLACE/
  state.json        whole or old: replaced after every stage, and every few seconds inside one
  answers.jsonl     the model's own answers, a line as soon as one is finished; kept afterwards
  learned.jsonl     with --continue: what chat and serve kept, as it was when training began
  heldout.jsonl     the prompts that the benchmark asks
  training/         the run of the trainer, with a state of its own
  made/             the streams as they will be installed, once training is over
  bench/            the benchmark's result

Everything but the answers is removed once the streams are installed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import OptionError, OutputError
from ...train.awake import awake_s
from ...weights.files import atomic_file, remove_leftovers

STATE_FILE = "state.json"
ANSWERS_FILE, LEARNED_FILE, HELD_OUT_FILE = "answers.jsonl", "learned.jsonl", "heldout.jsonl"
SAVE_S = 5.0


@dataclass(frozen=True)
class AdoptSettings:
    """What was asked for; the same command has the same settings."""

    model: str
    adapter_path: str | None = None
    minutes: float = 60.0
    mode: str = "lossless"
    prompts: str | None = None
    documents: tuple[str, ...] = ()
    further: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 100_000:
            raise OptionError(
                f"--minutes must be above 0 and at most 100,000, got {self.minutes:g}."
            )
        object.__setattr__(self, "documents", tuple(self.documents))

    def changed(self, before: dict[str, Any]) -> str | None:
        """Return the first option that differs from those of an adoption under way."""
        for name, now in self.to_dict().items():
            if before.get(name) != now:
                flag = "--continue" if name == "further" else f"--{name.replace('_', '-')}"
                return f"{flag} was {before.get(name)} and is now {now}"
        return None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "documents": list(self.documents)}


@dataclass
class AdoptionState:
    """Where an adoption stands.

    plan: what was agreed to (`plan.py`), None before. spent: seconds by stage, over all sittings.
    done: stages that are over. model: the digest of its weights. figures: what was measured.
    """

    folder: Path
    settings: AdoptSettings
    plan: dict[str, Any] | None = None
    spent: dict[str, float] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    model: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, settings: AdoptSettings, restart: bool = False) -> AdoptionState:
        """Return the state to go on from, a new one if there is none.

        Raises:
            OptionError: an adoption with other options is under way.
            OutputError: the file is damaged.
        """
        path = folder / STATE_FILE
        if restart or not path.exists():
            # Answers to the same prompts may be another model's that lay here before.
            clear(folder, everything=not settings.further)
            return cls(folder, settings)
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            before = dict(told.pop("settings"))
            state = cls(folder, settings, **told)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} is damaged, so this adoption cannot be continued; add --restart to begin anew."
            ) from error
        if change := settings.changed(before):
            raise OptionError(
                f"an adoption of {settings.model} is under way with other options: {change}; give "
                "the same command to continue it, or add --restart to begin anew."
            )
        return state

    def check_model(self, digest: str) -> None:
        """Make sure that an adoption goes on with the model it began with.

        Raises:
            OptionError: its weights have changed.
        """
        if self.model and self.model != digest:
            raise OptionError(
                f"{self.settings.model} has changed since its adoption began, and what was learnt belongs "
                "to what it was; add --restart to begin anew."
            )
        self.model = digest

    def save(self) -> None:
        """Replace the file.

        Raises:
            OutputError: it cannot be written.
        """
        told = {
            "settings": self.settings.to_dict(),
            "plan": self.plan,
            "spent": self.spent,
            "done": self.done,
            "model": self.model,
            "figures": self.figures,
        }
        with atomic_file(self.folder / STATE_FILE, if_exists="replace") as path:
            path.write_text(json.dumps(told, indent=1), encoding="utf-8")

    @property
    def spent_s(self) -> float:
        """Return the seconds spent so far."""
        return sum(self.spent.values())

    @property
    def left_s(self) -> float:
        """Return the seconds that are left of the minutes given."""
        return max(0.0, 60 * self.settings.minutes - self.spent_s)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageClock]:
        """Time a stage; it is done when the block ends without an error."""
        clock = StageClock(self, name)
        try:
            yield clock
            self.done += [name] if name not in self.done else []
        finally:
            clock.tick(save=True)


@dataclass
class StageClock:
    """The time of one stage, written to the state every few seconds."""

    state: AdoptionState
    name: str
    since: float = field(default_factory=awake_s)
    saved: float = field(default_factory=awake_s)

    def tick(self, *, save: bool = False) -> float:
        """Take in the time since the last tick; return the stage's seconds over all sittings."""
        now, spent = awake_s(), self.state.spent
        spent[self.name] = spent.get(self.name, 0.0) + now - self.since
        self.since = now
        if save or now - self.saved > SAVE_S:
            self.state.save()
            self.saved = now
        return spent[self.name]


def clear(folder: Path, *, everything: bool = False) -> None:
    """Remove what an adoption needed; its answers only with `everything`."""
    for name in ("training", "made", "bench"):
        shutil.rmtree(folder / name, ignore_errors=True)
        remove_leftovers(folder / name)
    files = [STATE_FILE, HELD_OUT_FILE, LEARNED_FILE]
    files += [ANSWERS_FILE] if everything else []
    for name in files:
        (folder / name).unlink(missing_ok=True)
        remove_leftovers(folder / name)


def is_further(folder: Path) -> bool:
    """Tell whether the adoption under way in a folder trains on from streams, maybe on kept answers."""
    try:
        told = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return told["settings"]["further"] is not False
    except (OSError, ValueError, KeyError, TypeError):
        return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold an adoption's folder, which is its owner's alone, for this process.

    Raises:
        OutputError: another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise OutputError(
            f"the cache folder {folder} cannot be written ({error.strerror}); name another in "
            "SPECSTREAM_CACHE."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                "another process is adopting this model; wait for it, or end it first."
            ) from None
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
