"""Training the pruner alone, for streams that are finished [SS §4.1: after the streams].

Everything else stays as it is, bit for bit: only the pruner's tensors get gradients. One pass of
the lower layers a batch, no stream rows at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import base_states, pad_texts
from .batches import Selection
from .early_exit import exit_rows, exit_states
from .head import Head
from .loss import Tensors
from .measure import Ranks, rank
from .objective import BatchResult, LosslessObjective
from .targets import TargetRows


class PrunerObjective(LosslessObjective):
    """Next-token cross-entropy of the early exit, the mean over an update's positions."""

    def gradients(
        self, tensors: Tensors, batch: Sequence[Selection], weights: np.ndarray, head: Head
    ) -> BatchResult:
        result = self.empty(tensors)
        base = base_states(
            self.backbone,
            pad_texts([s.example.tokens[:-1] for s in batch]),
            self.config.num_msa_layers,
        )
        self._add_pruner(result, tensors, batch, base, float(weights[0]), head)
        return result

    def weights(self, batches: Sequence[Sequence[Selection]]) -> np.ndarray:
        """Return what a row counts, (1,)."""
        rows = sum(len(s.positions) for batch in batches for s in batch)
        return np.array([1 / max(1, rows)], dtype=np.float32)

    def empty(self, tensors: Tensors) -> BatchResult:
        own = {name: t for name, t in tensors.items() if name.startswith("pruner.")}
        result = super().empty(own)
        result.conditioned = None
        return result

    def measure(self, tensors: Tensors, batch: Sequence[Selection]) -> list[Ranks]:
        """Rank the next token at every selected position, as if the early exit were a stream."""
        tokens = pad_texts([s.example.tokens[:-1] for s in batch])
        base = base_states(self.backbone, tokens, self.config.num_msa_layers)
        text, at, target = exit_rows(batch)
        hidden = exit_states(tensors, self.backbone, base, text, at)
        index = np.arange(len(target), dtype=np.int32)
        rows = TargetRows(index, np.zeros_like(index), text, target, target, target, at)
        return [rank(hidden, rows, len(index), 1, self.backbone, None)]

    def figures(self, ranks: Sequence[Ranks]) -> dict[str, object]:
        told = super().figures(ranks)
        kept = {f"exit_top{k}": told[f"marginal_top{k}"] for k in (1, 3)}
        return {"positions": told["positions"], "loss": told["loss"], **kept}
