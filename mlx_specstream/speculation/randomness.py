"""Random numbers that depend on an answer's seed and a place in its text, and on nothing else.

mlx-lm's samplers take their numbers from MLX's global generator. How many have been taken when
a token is drawn depends on how many rows were drawn before, and so on the trees; therefore the
generator is set anew for every token and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import mlx.core as mx

from ..machine import ranks
from .result import to_ints

_MASK = 2**64 - 1


def take_seed() -> int:
    """Return a seed for one answer from MLX's global generator, which moves on."""
    state = _state()
    mx.random.seed(mixed(state + 1))
    return mixed(state)


def share_seed() -> None:
    """Let MLX's global generator go on from the same state in all processes that decode together."""
    if ranks.group() is not None:
        mx.random.seed(int.from_bytes(ranks.told(_state().to_bytes(8, "little")), "little"))


@contextmanager
def seeded(seed: int, place: int) -> Iterator[None]:
    """Let MLX's global generator start at a place of an answer, and put it back afterwards."""
    # Reading it is free: it was last set from an integer, unless others drew from it since.
    others = _state()
    mx.random.seed((mixed(seed) + place) & _MASK)
    try:
        yield
    finally:
        mx.random.seed(others)


def mixed(number: int) -> int:
    """Return 64 bits that depend on all of `number`'s (Steele et al., 2014: SplitMix64)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def _state() -> int:
    """Return the global generator's key as the integer that seeds it."""
    high, low = to_ints(cast(list[mx.array], mx.random.state)[0])
    return high << 32 | low
