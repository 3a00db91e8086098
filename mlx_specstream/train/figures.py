"""How good drafts are, teacher-forced over held-out texts, with the whole vocabulary.

A stream hits when the text's token is its best candidate (top-1), or among its best two or three.
In a chain the parents of accepted drafts are the text's own tokens, so conditioning on the true
parent is exactly what decoding does; re-ranking is limited to the candidates decoding looks at.

    expected chain tokens per step = 1 + mean over positions of the drafts accepted in a row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_CANDIDATES = 32
"""Only a stream's best candidates are re-ranked, at decoding and when measuring."""


@dataclass(frozen=True)
class Ranks:
    """Where the true token stands among each stream's candidates, 0 first; (N, γ) on the host.

    marginal, conditioned: at most NUM_CANDIDATES, which also stands for a row without a target.
    loss: cross-entropy of each row, zero where there is no target. valid: (N, γ) bool.
    """

    marginal: np.ndarray
    conditioned: np.ndarray | None
    loss: np.ndarray
    valid: np.ndarray

    @classmethod
    def of(
        cls,
        index: np.ndarray,
        shape: tuple[int, int],
        marginal: Sequence[np.ndarray],
        conditioned: Sequence[np.ndarray],
        losses: Sequence[np.ndarray],
    ) -> Ranks:
        """Put together what was found chunk by chunk of the rows with a target.

        index: (R,), their places among the N·γ rows. shape: (N, γ). conditioned: may be empty.
        """

        def spread(parts: Sequence[np.ndarray], empty: float) -> np.ndarray:
            table = np.full(shape[0] * shape[1], empty, dtype=np.float32)
            if len(index):
                table[index] = np.concatenate(parts)
            return table.reshape(shape)

        ranks = spread(marginal, NUM_CANDIDATES)
        given = spread(conditioned, NUM_CANDIDATES) if conditioned else None
        valid = spread([np.ones(len(index))], 0.0).astype(bool)
        return cls(ranks, given, spread(losses, 0.0), valid)


def chain_lengths(ranks: np.ndarray) -> np.ndarray:
    """Return how many drafts of a chain are accepted at each position, (N,)."""
    hits: np.ndarray = np.cumprod(ranks == 0, axis=-1).sum(-1)
    return hits


def walk(accepted: Sequence[int]) -> list[int]:
    """Return the accepted drafts of every step when one text is decoded, its positions in order.

    A step at position t emits accepted[t] + 1 tokens and the next one starts that much further on.
    """
    steps, t = [], 0
    while t < len(accepted):
        steps.append(int(accepted[t]))
        t += steps[-1] + 1
    return steps


@dataclass
class Tally:
    """Tokens and steps of texts whose every position was scored: over all positions, and walking."""

    positions: int = 0
    accepted: int = 0
    steps: int = 0

    def add(self, accepted: Sequence[int]) -> None:
        """Count one text: the accepted drafts of each position, in order."""
        self.positions += len(accepted)
        self.accepted += sum(accepted)
        self.steps += len(walk(accepted))

    def figures(self) -> dict[str, float]:
        return {
            "all_positions": round(1 + self.accepted / max(1, self.positions), 4),
            "walking": round(self.positions / max(1, self.steps), 4),
        }


def mean_per_stream(losses: np.ndarray, stream: np.ndarray, num_streams: int) -> list[float]:
    """Return the mean loss of each stream; `stream` (R,) says which one a loss (R,) belongs to."""
    sums = np.bincount(stream, losses, minlength=num_streams)
    counts = np.maximum(np.bincount(stream, minlength=num_streams), 1)
    return [round(float(value), 4) for value in sums / counts]


def summarize(parts: Sequence[Ranks]) -> dict[str, object]:
    """Return figures over all positions: loss, top-1/2/3 per stream, chain tokens per step."""
    valid = np.concatenate([part.valid for part in parts])
    counts = np.maximum(valid.sum(0), 1)
    loss = np.concatenate([part.loss for part in parts]).sum(0) / counts
    figures: dict[str, object] = {
        "positions": int(valid[:, 0].sum()),
        "loss": [round(float(v), 4) for v in loss],
    }
    for name in ("marginal", "conditioned"):
        tables = [getattr(part, name) for part in parts]
        if any(table is None for table in tables):
            continue
        ranks = np.concatenate(tables)
        for k in (1, 2, 3):
            share = ((ranks < k) & valid).sum(0) / counts
            figures[f"{name}_top{k}"] = [round(float(v), 4) for v in share]
        real = valid[:, 0]  # what only fills up a segment has no target at all
        figures[f"{name}_chain"] = round(1 + float(chain_lengths(ranks)[real].mean()), 4)
    return figures
