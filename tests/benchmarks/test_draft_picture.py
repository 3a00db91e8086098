"""The README's picture: every pass of a real answer is in it, and nothing that could run or be fetched."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import draft_picture

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: ElementTree.Element, name: str) -> str:
    (group,) = [g for g in svg.iter(f"{SVG}g") if g.get("id") == name]
    return "".join(group.itertext())


def test_every_pass_is_drawn(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "draft.svg"
    words = ["--model", folder, "--max-tokens", "12", "--prompt", "a < b & c", "--tree", "5"]
    assert draft_picture.main([*words, "--output", str(path)]) == 0
    found = re.search(r"12 tokens in (\d+) passes", capsys.readouterr().out)
    assert found
    passes = int(found[1])
    svg = ElementTree.parse(path).getroot()
    assert "a < b & c" in texts(svg, "s0")
    assert texts(svg, f"s{passes}").startswith(str(passes))
    assert texts(svg, f"t{passes - 1}").startswith(f"{passes} passes of the model: 12 tokens.")
    style = svg.findtext(f"{SVG}style") or ""
    # The line at the foot is one at a time, and its last one is what a still picture shows.
    hidden = [g.get("id") for g in svg.iter(f"{SVG}g") if g.get("class") == "m"]
    assert hidden == [f"t{n}" for n in range(passes - 1)]
    assert style.count("animation:") == 1 + 2 * passes


def test_the_picture_of_the_readme_is_of_such_a_run() -> None:
    path = ROOT / "docs" / "images" / "draft.svg"
    text = path.read_text(encoding="utf-8")
    svg = ElementTree.fromstring(text)
    assert draft_picture.PROMPT in texts(svg, "s0")
    assert not re.search(r"<script|href|@import|url\(|<foreignObject|on\w+=", text)
    assert "docs/images/draft.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
