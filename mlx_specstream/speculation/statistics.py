"""What speculation did: passes, drafts, and how many of them each pass kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .result import LOOK_UP


@dataclass(frozen=True)
class SpeculationStats:
    """Figures of one answer, or of several added up.

    passes: forward passes after the prompt. tokens: tokens given out. drafted: draft tokens
    verified. accepted: tokens given out that a draft had proposed, looked_up: those of them by
    look-up. histogram: entry n counts the passes in which n drafts were accepted. lossy: by typical
    acceptance, so the text is not the model's own.
    """

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    histogram: tuple[int, ...] = ()
    lossy: bool = False
    looked_up: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Return tokens given out per pass (0 before the first)."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Return the share of drafts that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def after(self, origins: Sequence[int], drafted: int) -> SpeculationStats:
        """Return the figures with one more pass.

        origins: of the tokens it gave out, the stream that had proposed each, `LOOK_UP`, or 0 for
        none.
        """
        accepted, looked_up = sum(o != 0 for o in origins), sum(o == LOOK_UP for o in origins)
        histogram = (0,) * accepted + (1,)
        one = SpeculationStats(1, len(origins), drafted, accepted, histogram, looked_up=looked_up)
        return self + one

    def __add__(self, other: SpeculationStats) -> SpeculationStats:
        size = max(len(self.histogram), len(other.histogram))
        mine, theirs = (s.histogram + (0,) * (size - len(s.histogram)) for s in (self, other))
        return SpeculationStats(
            self.passes + other.passes,
            self.tokens + other.tokens,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            tuple(a + b for a, b in zip(mine, theirs, strict=True)),
            self.lossy or other.lossy,
            self.looked_up + other.looked_up,
        )

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "passes": self.passes,
            "tokens": self.tokens,
            "tokens_per_step": round(self.tokens_per_step, 4),
            "drafted": self.drafted,
            "accepted": self.accepted,
            "looked_up": self.looked_up,
            "acceptance_rate": round(self.acceptance_rate, 4),
            "histogram": list(self.histogram),
            "lossy": self.lossy,
        }

    def __str__(self) -> str:
        steps = " ".join(f"{n}:{count}" for n, count in enumerate(self.histogram))
        found = f", {self.looked_up} of them looked up" if self.looked_up else ""
        return (
            f"{self.tokens} tokens in {self.passes} passes, {self.tokens_per_step:.2f} per pass; "
            f"{self.accepted} of {self.drafted} drafts accepted{found}; passes by drafts accepted {steps}"
            + ("; lossy (typical acceptance)" if self.lossy else "")
        )
