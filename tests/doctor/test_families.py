from __future__ import annotations

import json

import pytest

from mlx_specstream import cli
from mlx_specstream.doctor.families import family_names
from mlx_specstream.model.families.refused import REFUSED
from tests.support.tiny_models import family_modules


def test_names_are_those_of_the_modules_with_a_model() -> None:
    assert family_names() == family_modules()


@pytest.mark.parametrize("words", [["doctor", "--families", "--json"], ["families", "--json"]])
def test_refused_families_come_with_their_reason(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)["families"]
    assert found["llama"] is None
    assert found["mamba"] == REFUSED["mamba"]


def test_the_list_names_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--families"]) == 0
    printed = capsys.readouterr().out
    assert "  llama\n" in printed
    assert f"  mamba: {REFUSED['mamba']}\n" in printed
    assert all(f"  {name}" in printed for name in family_names())
