"""Drawing the target's tokens for a batch: every sequence with its own sampler and processors.

Rows of sequences that take the likeliest token are drawn together; each other sequence goes
through its own `TokenChooser`, exactly as it would alone. What one sequence's sampler or
processors raise is that sequence's failure and nobody else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..speculation.sampling import TokenChooser
from ..speculation.tree import chain


@dataclass(frozen=True)
class Drawn:
    """tokens: (B, T) int32. finite: (B,) bool. errors: what choosers raised, by row."""

    tokens: mx.array
    finite: mx.array
    errors: dict[int, Exception]


def draw(
    choosers: Sequence[TokenChooser], logits: mx.array, tokens: mx.array, num_drafts: Sequence[int]
) -> Drawn:
    """Draw a token at every row of every chain.

    Args:
        logits: (B, T, V). tokens: (B, T) int32, root and drafts.
        num_drafts: how many drafts of each row are real; the others only fill up the shape, and
            no chooser sees them.
    """
    T = tokens.shape[1]
    likeliest = mx.argmax(logits, axis=-1).astype(mx.int32)
    finite = ~mx.any(mx.isnan(mx.max(logits, axis=-1)), axis=-1)
    if all(_takes_likeliest(chooser) for chooser in choosers):
        return Drawn(likeliest, finite, {})
    rows, flags, errors = [], [], {}
    for row, chooser in enumerate(choosers):
        drawn, flag = likeliest[row], finite[row]
        if not _takes_likeliest(chooser):
            nodes = 1 + num_drafts[row]
            try:
                own, flag = chooser(logits[row, :nodes], chain(tokens[row, :nodes]))
            except Exception as error:
                errors[row] = error
            else:
                drawn = mx.pad(own, (0, T - nodes))
        rows.append(drawn)
        flags.append(flag.reshape(1))
    return Drawn(mx.stack(rows), mx.concatenate(flags), errors)


def _takes_likeliest(chooser: TokenChooser) -> bool:
    likeliest = chooser.sampler is None and not chooser.processors and chooser.typical is None
    return likeliest and type(chooser) is TokenChooser
