"""The size and order of the package in figures: lines, rooms, import arrows, files entered per token.

python -m benchmarks.house            all but the last; reads the sources, runs nothing
python -m benchmarks.house --entered  the files that `specstream generate` enters, with the demo model
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType

from mlx_specstream.exit_status import exit_status

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mlx_specstream"
OWN_ROOMS = ("convert.tensors", "convert.gguf", "convert.pytorch")
LINKED = ("apps", "convert")  # folders at the top of the repository, packages of mlx_specstream


@dataclass(frozen=True)
class Arrow:
    """One import between rooms: modules by their dotted names."""

    source: str
    target: str

    @property
    def source_room(self) -> str:
        return room(self.source)

    @property
    def target_room(self) -> str:
        return room(self.target)


def top_level_pairs(found: list[Arrow]) -> Counter[tuple[str, str]]:
    """Count imports by the parts of the package's top level that they run between."""
    pairs = ((arrow.source.split(".")[1], arrow.target.split(".")[1]) for arrow in found)
    return Counter(pair for pair in pairs if pair[0] != pair[1])


def room(name: str) -> str:
    """Return the top-level part of the package that a module is in; some inner folders are their own."""
    inner = ".".join(name.split(".")[1:3])
    return inner if inner in OWN_ROOMS else inner.partition(".")[0]


@cache
def modules() -> dict[str, Path]:
    """Return the package's modules by their dotted names, each with its one file."""
    found = {}
    for folder in (PACKAGE, *LINKED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT)
            if folder == PACKAGE and len(inside.parts) > 2 and inside.parts[1] in LINKED:
                continue
            parts = inside.with_suffix("").parts
            parts = parts if folder == PACKAGE else (PACKAGE, *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str) -> Iterator[str]:
    """Yield the package's modules that a module imports, also late ones."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            parts = package.split(".")
            parts = parts[: len(parts) - node.level + 1]
            base = ".".join([*parts, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            if (target := inner if inner in modules() else base) in modules():
                yield target


def arrows() -> list[Arrow]:
    """Return the imports from one room into another, one for each pair of modules."""
    return sorted(
        {
            Arrow(name, target)
            for name in modules()
            for target in imported(name)
            if PACKAGE not in (name, target) and room(name) != room(target)
        },
        key=lambda arrow: (arrow.source, arrow.target),
    )


def class_names() -> list[tuple[str, str]]:
    """Return every class of the package with its module."""
    return [
        (node.name, name)
        for name, path in modules().items()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]


def package_lines() -> int:
    """Return the lines of Python in the installed package."""
    return sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for name, path in modules().items()
        if name.startswith(PACKAGE)
    )


def top_level() -> list[str]:
    """Return the modules and folders at the package's top level."""
    hidden = ("__init__.py", "__main__.py", "py.typed")
    entries = [entry for entry in (ROOT / PACKAGE).iterdir() if entry.name not in hidden]
    # A folder that another layout left behind holds compiled files at most.
    kept = [e for e in entries if e.is_file() or any(p.suffix != ".pyc" for p in e.rglob("*.*"))]
    return sorted(entry.name for entry in kept)


MAP_PAGE = ROOT / "docs" / "how-it-works.md"
_MAP = re.compile(r"(<!-- map -->\n).*(<!-- end of map -->\n)", re.DOTALL)
# The order in which a newcomer meets the folders.
FOLDERS = (
    *("speculation", "model", "generation", "planner", "batch", "config", "weights", "loading"),
    *("prompts", "train", "bench", "doctor", "machine", "commands"),
)
# Folders inside these, and those at the repository's top: what their files open with is their table.
INNER = (
    *("model/cache", "model/families", "weights/tensorfile", "apps", "apps/chat", "apps/serve"),
    *("convert", "convert/gguf", "convert/pytorch"),
)


def folder_map() -> str:
    """Return the tables that the folders open with, in Markdown."""
    parts = []
    for name in FOLDERS:
        source = (ROOT / PACKAGE / name / "__init__.py").read_text(encoding="utf-8")
        purpose, *rest = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
        table = next(part for part in rest if part.startswith("| file |"))
        parts.append(f"### `{name}/`\n\n{' '.join(purpose.split())}\n\n{table}\n")
    for name in INNER:
        folder = ROOT / (name if name.split("/")[0] in LINKED else f"{PACKAGE}/{name}")
        parts.append(
            f"### `{name}/`\n\n{opening(folder / '__init__.py')}\n\n{opening_table(folder)}\n"
        )
    return "\n".join(parts)


def opening(path: Path) -> str:
    """Return the first line that a file says of itself."""
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]


def opening_table(folder: Path) -> str:
    """Return a table of a folder's files, each with its opening words."""
    rows = [
        f"| `{path.name}` | {opening(path).rstrip('.:')} |"
        for path in sorted(folder.glob("*.py"))
        if path.name != "__init__.py"
    ]
    return "\n".join(["| file | in its own words |", "|---|---|", *rows])


def page_with_map() -> str:
    """Return docs/how-it-works.md with the folders' present tables in it."""
    page = MAP_PAGE.read_text(encoding="utf-8")
    return _MAP.sub(lambda found: f"{found[1]}\n{folder_map()}\n{found[2]}", page)


def entered(words: list[str]) -> tuple[set[str], set[str]]:
    """Return the package's own files in which a function is called while `specstream` runs `words`.

    The second set: from the call of `stream_generate` on, when model and prompt have been read.
    """
    from mlx_specstream import cli

    files: set[str] = set()
    answering: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        # The bodies of modules and classes run at import, not on a token's way: their names are no locals.
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            files.add(frame.f_code.co_filename)
            if answering or frame.f_code.co_name == "stream_generate":
                answering.add(frame.f_code.co_filename)

    with contextlib.redirect_stdout(io.StringIO()):
        sys.setprofile(note)
        try:
            cli.main(words)
        finally:
            sys.setprofile(None)
    own = {str(path.resolve()) for path in modules().values()}
    whole, part = (
        {str(Path(file).resolve()) for file in found} & own for found in (files, answering)
    )
    return whole, part


def main(argv: list[str]) -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    parser.add_argument("--entered", action="store_true", help="run the demo model, count files")
    parser.add_argument("--map", action="store_true", help="renew the tables of the documentation")
    options = parser.parse_args(argv)
    if options.map:
        MAP_PAGE.write_text(page_with_map(), encoding="utf-8")
        return 0
    if options.entered:
        for tree in ("16", "auto"):
            words = ["generate", "--model", "demo", "--prompt", "Hi", "-m", "24", "--tree", tree]
            files, answering = entered(words)
            print(
                f"files entered by specstream generate -m 24 --tree {tree}: {len(files)}, of which "
                f"{len(answering)} from prompt tokens to text (marked *)"
            )
            for file in sorted(files):
                print(f"{'*' if file in answering else ' '} {Path(file).relative_to(ROOT)}")
        return 0
    found = arrows()
    pairs = top_level_pairs(found)
    twice = {name: n for name, n in Counter(name for name, _ in class_names()).items() if n > 1}
    print(f"lines of the installed package: {package_lines()}")
    print(f"modules and folders at its top level: {len(top_level())}")
    print(f"import arrows between top-level rooms: {len(pairs)} ({len(found)} imports)")
    print(f"class names used twice: {len(twice)} ({', '.join(sorted(twice))})")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), "house"))
