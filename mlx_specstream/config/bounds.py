"""Numbers as callers give them: of the right kind and within bounds, or refused in one sentence.

NumPy's scalars and whole floats are taken as the numbers they are; what comes out is Python's own.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from ..errors import OptionError, shown


def whole(value: Any, low: int | None, high: int | None, sentence: str) -> int:
    """Return a whole number from `low` to `high`; None: no such bound.

    Raises:
        OptionError: it is something else; `sentence` says what it must be.
    """
    if _is_number(value):
        integral = isinstance(value, int) or (math.isfinite(value) and value == int(value))
        above, below = low is None or value >= low, high is None or value <= high
        if integral and above and below:
            return int(value)
    raise OptionError(f"{sentence}, got {shown(value)}.")


def number(value: Any, low: float | None, high: float | None, sentence: str) -> float:
    """Return a finite number from `low` to `high`; None: no such bound.

    Raises:
        OptionError: it is something else; `sentence` says what it must be.
    """
    if _is_number(value):
        try:
            found = float(value)
        except OverflowError:  # an int beyond every float
            found = math.inf
        above, below = low is None or found >= low, high is None or found <= high
        if math.isfinite(found) and above and below:
            return found
    raise OptionError(f"{sentence}, got {shown(value)}.")


def _is_number(value: object) -> bool:
    """Tell whether a value is a real number, NumPy's scalars among them; True and False are none."""
    return isinstance(value, Real) and type(value) is not bool
