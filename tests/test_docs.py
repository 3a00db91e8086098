"""The pages: links lead somewhere, every page is in the index, and no table says a thing twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlx_specstream import cli

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *DOCS,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "examples")),
    *sorted((ROOT / "mlx_specstream" / "shipped").glob("*/README.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
# Words that said nothing to a reader, and what is written instead.
OLD = {
    r"\bpark(s|ed|ing)?\b": "decodes plainly",
    r"\bin vain\b": "that does not pay",
    r"\bhopeless\b": "never profitable",
    r"\b(a|looks?) (look|again)\b": "a probe",
    r"\bgrafts?\b": "replaces modules",
    r"\btakeover\b": "warm start",
}


def prose(path: Path) -> str:
    """A page without its code."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in found)
    return {heading.replace(" ", "-") for heading in plain}


def dead_links(path: Path) -> list[str]:
    """The links of a page that lead nowhere in the repository."""
    dead = []
    for link in LINK.findall(prose(path)):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert not dead_links(path)


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Some `x`: head!\n[a](page.md#some-x-head) [b](#some) [c](no.md)\n")
    assert dead_links(page) == ["#some", "no.md"]


def test_every_page_is_in_the_index_and_begins_with_its_purpose() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(index))
    }
    for path in DOCS:
        assert path == index or path in linked, path.name
        title, _, first = path.read_text(encoding="utf-8").split("\n")[:3]
        assert title.startswith("# "), path.name
        assert re.match(r"[A-Z]", first), f"{path.name}: {first}"


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md"], ids=lambda path: path.name)
def test_old_words_are_gone(path: Path) -> None:
    text = prose(path)
    for word, better in OLD.items():
        found = re.search(word, text, flags=re.IGNORECASE)
        assert not found, f"{path.name}: {found[0]!r}; write {better}"


def test_no_row_of_figures_stands_twice() -> None:
    seen: dict[tuple[str, ...], str] = {}
    for path in DOCS:
        for line in prose(path).splitlines():
            figures = tuple(re.findall(r"\d+\.\d+", line))
            if line.startswith("|") and len(figures) > 2:
                assert figures not in seen, f"{path.name} and {seen[figures]}: {line}"
                seen[figures] = path.name


def test_the_glossary_explains_a_word_once_and_after_those_it_needs() -> None:
    rows = re.findall(r"^\| (.+?) \| .+ \|$", prose(ROOT / "docs" / "glossary.md"), re.MULTILINE)
    words = [word for row in rows[1:] for word in row.split(", ")]
    assert len(words) == len(set(words)) > 30
    places = {word: place for place, word in enumerate(words)}
    assert places["token"] < places["pass"] < places["row"] < places["draft"] < places["chain"]


def test_the_readme_is_short_and_begins_with_what_to_type() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    first = FENCE.search(text)
    assert first
    assert [line.split("#")[0].strip() for line in first[0].splitlines()[1:-1]] == [
        "make demo",
        "make test",
    ]
    assert first.start() < 400
    assert "Nothing here has run on a Mac" in text


def test_the_verbs_and_flags_of_the_pages_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that a page shows is one that its verb understands, by its flags at least."""
    from mlx_specstream.commands.words import check_flags

    seen = 0
    for path in [*DOCS, ROOT / "README.md"]:
        for code in FENCE.findall(path.read_text(encoding="utf-8")):
            for line in code.replace("\\\n", " ").splitlines():
                found = re.match(r"\s*specstream (\w+)(.*)", line)
                if not found or found[1] not in cli.VERBS:
                    assert not found or found[1] in cli.OTHER_NAMES, f"{path.name}: {line}"
                    continue
                words = re.findall(r'"[^"]*"|[^\s"]+', found[2].split(" #")[0])
                words = words[: words.index("|")] if "|" in words else words
                module = __import__(cli.VERBS[found[1]].module, fromlist=["build_parser"])
                make = getattr(module, "parser_for", lambda _, m=module: m.build_parser())
                check_flags(found[1], [w for w in words if not w.startswith('"')], make(words))
                seen += 1
    assert seen > 30
