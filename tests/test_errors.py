"""What errors and other people's names look like in a message."""

import pytest

from mlx_specstream.errors import brief, printable, shown


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("one.\nand an excerpt", "one"),
        ("\n  Errors in loading:\n\tsize mismatch for w:\n more", "Errors in loading: size mismatch for w"),
        (ValueError(), "ValueError"),
        ("x" * 300, "x" * 197),
    ],
)  # fmt: skip
def test_an_error_is_told_in_one_line(said, expected):
    assert brief(said) == expected


def test_values_are_quoted_and_never_endless():
    assert shown("a\x1b[2J\n") == r"'a\x1b[2J\n'"
    assert shown(1 << 300) == "a number far too large"
    assert len(shown("x" * 1000)) == 120


def test_names_cannot_steer_the_terminal():
    assert printable("a\x1b[2J\u202eb\nc \x07é") == r"a\x1b[2J\u202eb c \x07é"
