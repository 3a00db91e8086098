"""What a run found, counted by kind, as JSON that later runs can be added to."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from mlx_specstream.weights.files import atomic_file
from tests.support.exactness.compare import Outcome

KINDS = (
    "family",
    "precision",
    "cache",
    "drafts",
    "lookup",
    "choice",
    "tree",
    "schedule",
    "pruning",
    "turns",
    "together",
)


@dataclass
class Tally:
    """Counts per kind and verdict; `near_ties` and `mismatches` tell the cases.

    left_out: cases that mlx-lm itself cannot compute here.
    """

    cases: int = 0
    left_out: int = 0
    tokens: int = 0
    accepted: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {kind: Counter() for kind in KINDS}
    )
    near_ties: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count a case."""
        case, scene = outcome.case, outcome.case.scene
        self.cases += 1
        self.tokens += outcome.tokens
        self.accepted += outcome.accepted
        self.verdicts[outcome.verdict] += 1
        values = {
            "family": scene.family,
            "precision": scene.precision,
            "cache": scene.cache,
            "drafts": case.drafts,
            "lookup": "yes" if "lookup" in (case.decode.drafts or ()) else "no",
            "choice": scene.choice,
            "tree": str(case.decode.tree),
            "schedule": case.decode.schedule,
            "pruning": "yes" if case.decode.prune else "no",
            "turns": str(len(scene.turns)),
            "together": "alone" if case.beside < 0 else f"with {case.beside + 1}",
        }
        for kind, value in values.items():
            self.counts[kind][value] += 1
        told = (
            f"case {case.number} ({scene.family}, {scene.precision}, {scene.cache}): {outcome.told}"
        )
        if outcome.verdict == "near-tie":
            self.near_ties.append(told)
        elif outcome.verdict == "mismatch":
            self.mismatches.append(told)

    def write(self, path: Path, run: dict[str, object]) -> None:
        """Write all counts, and what describes the run, as one JSON object."""
        record = {
            **run,
            "cases": self.cases,
            "left_out": self.left_out,
            "tokens": self.tokens,
            "accepted_drafts": self.accepted,
            "verdicts": dict(self.verdicts),
            **{kind: dict(sorted(counts.items())) for kind, counts in self.counts.items()},
            "near_ties": self.near_ties,
            "mismatches": self.mismatches,
        }
        with atomic_file(path, if_exists="replace") as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [
            f"{self.cases} cases, {self.tokens} tokens, {self.accepted} accepted drafts: "
            + ", ".join(f"{number} {verdict}" for verdict, number in self.verdicts.most_common())
            + f"; {self.left_out} left out, which mlx-lm cannot compute here"
        ]
        for kind, counts in self.counts.items():
            lines.append(f"{kind}: " + ", ".join(f"{v} {n}" for v, n in sorted(counts.items())))
        return "\n".join([*lines, *self.mismatches])
