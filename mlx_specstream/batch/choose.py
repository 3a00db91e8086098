"""Drawing the target's tokens for a batch: every sequence with its own sampler and processors.

Rows of sequences that take the likeliest token are drawn together; each other sequence goes
through its own `TokenSampler`, exactly as it would alone. What one sequence's sampler or
processors raise is that sequence's failure and nobody else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..speculation.sampling import TokenSampler
from ..speculation.tree import chain
from .chains import Chains


@dataclass(frozen=True)
class Drawn:
    """tokens: (B, T) int32. finite: (B, T) bool, no logit is NaN. errors: what token_samplers raised, by row."""

    tokens: mx.array
    finite: mx.array
    errors: dict[int, Exception]


def draw(token_samplers: Sequence[TokenSampler], logits: mx.array, chains: Chains) -> Drawn:
    """Draw a token at every row of every chain, from logits (B, T, V).

    What fills a chain up no token_sampler sees.
    """
    T = chains.tokens.shape[1]
    likeliest = mx.argmax(logits, axis=-1).view(mx.int32)
    highest = mx.max(logits, axis=-1)
    finite = highest == highest
    if all(_takes_likeliest(token_sampler) for token_sampler in token_samplers):
        return Drawn(likeliest, finite, {})
    rows, flags, errors = [], [], {}
    for row, token_sampler in enumerate(token_samplers):
        drawn, flag = likeliest[row], finite[row]
        if not _takes_likeliest(token_sampler):
            nodes = chains.lengths[row]
            tree = chain(chains.tokens[row, :nodes])
            if chains.alive is not None:
                tree = replace(tree, alive=chains.alive[row, :nodes])
            try:
                own, flag = token_sampler(logits[row, :nodes], tree)
            except Exception as error:
                errors[row] = error
            else:
                drawn = mx.pad(own, (0, T - nodes))
                flag = mx.pad(flag, (0, T - nodes), constant_values=mx.array(True))
        rows.append(drawn)
        flags.append(flag)
    return Drawn(mx.stack(rows), mx.stack(flags), errors)


def _takes_likeliest(token_sampler: TokenSampler) -> bool:
    likeliest = (
        token_sampler.sampler is None
        and not token_sampler.processors
        and token_sampler.typical is None
    )
    return likeliest and type(token_sampler) is TokenSampler
