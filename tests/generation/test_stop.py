"""Stop strings: text fed in any pieces ends at the same place."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream.errors import OptionError
from mlx_specstream.generation.stop import StopStrings
from tests.support.engine import examples

LETTERS = st.text(alphabet="ab#", max_size=12)


def fed(stop: StopStrings, pieces: list[str]) -> tuple[str, bool]:
    """Return the text given out and whether a stop string ended it."""
    out = ""
    for piece in pieces:
        text, stopped = stop.feed(piece)
        out += text
        if stopped:
            return out, True
    return out + stop.flush(), False


def by_hand(text: str, strings: list[str]) -> tuple[str, bool]:
    """Cut letter by letter: the first string to be complete ends it, the longest if several."""
    for end in range(1, len(text) + 1):
        done = [s for s in strings if text[:end].endswith(s)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


@given(
    text=LETTERS,
    strings=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
@examples(100)
def test_pieces_do_not_matter(text: str, strings: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert fed(StopStrings(strings), pieces) == by_hand(text, strings)


def test_nothing_is_held_longer_than_needed() -> None:
    stop = StopStrings(["###"])
    assert [stop.feed(piece) for piece in ("a#", "#b", "##", "#c")] == [
        ("a", False),
        ("##b", False),
        ("", False),
        ("", True),
    ]


def test_a_lone_string_is_one_stop_string() -> None:
    assert StopStrings("end").strings == ("end",)


@pytest.mark.parametrize("strings", [[""], ["a", ""], [3]])
def test_bad_strings(strings: list[str]) -> None:
    with pytest.raises(OptionError, match="stop strings must be"):
        StopStrings(strings)
