"""Tensors found against tensors expected: the first difference, as a clause for a message."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from ...errors import shown

Shape = tuple[int, ...]
_COMPARED_NAMES = 20_000
_COMPARED_LETTERS = 200


def difference(
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    called: Mapping[str, str] | None = None,
) -> str | None:
    """Return what is wrong with names and shapes, None where all are as expected.

    found {"norm.wieght": (4,)}, expected {"norm.weight": (4,)}:
        the tensor 'norm.wieght' (4,) has no place; the nearest name is norm.weight (4,)

    Args:
        called: found name -> what its file calls it, where that is another name.
    """

    def told(name: str) -> str:
        own, plain = (called or {}).get(name, name), name if name in expected else shown(name)
        return f"{shown(own)} (as {plain})" if own != name else plain

    for name, shape in found.items():
        if name not in expected:
            return f"the tensor {told(name)} {shape} has no place{_nearest(name, expected)}"
    for name, shape in found.items():
        if shape != expected[name]:
            return f"the tensor {told(name)} has the shape {shape}, expected {expected[name]}"
    for name, shape in expected.items():
        if name not in found:
            return f"the tensor {name} {shape} is missing"
    return None


def _nearest(name: str, expected: Mapping[str, Shape]) -> str:
    """Return the end of a clause that names the nearest expected name, if one is near."""
    names = list(expected)[:_COMPARED_NAMES]
    close = difflib.get_close_matches(name[:_COMPARED_LETTERS], names, n=1, cutoff=0.3)
    return f"; the nearest name is {close[0]} {expected[close[0]]}" if close else ""
