"""The house in order: every folder says what its files hold, and imports run one way."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from benchmarks.house import (
    MAP_PAGE,
    ROOT,
    Arrow,
    arrows,
    class_names,
    modules,
    page_with_map,
    top_level,
    top_level_pairs,
)

# From the ground up: a room imports from those before it. Parts of convert/ are rooms of their own:
# the tensors it reads, GGUF files, which the demo model is loaded from, and the PyTorch trainer.
ORDER = (
    *("errors", "machine", "exit_status", "config", "weights", "convert.tensors"),
    *("convert.gguf", "model", "speculation", "loading", "utils", "sample_utils", "models"),
    *(
        "planner",
        "prompts",
        "generation",
        "batch",
        "verify",
        "train",
    ),
    *("convert.pytorch", "convert", "bench", "doctor", "apps", "commands", "cli", "__main__"),
)
FOLDERS = sorted(
    path.parent
    for path in (ROOT / "mlx_specstream").glob("*/__init__.py")
    if not path.parent.is_symlink()
)


def train_docstring() -> ast.Module:
    return ast.parse((ROOT / "mlx_specstream/train/__init__.py").read_text("utf-8"))


@cache
def found() -> list[Arrow]:
    return arrows()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_opens_with_its_purpose_and_a_table_of_its_files(folder: Path) -> None:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    named = re.findall(r"^\| `([^`]+)` \|", docstring, re.MULTILINE)
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    assert docstring.splitlines()[0].endswith(".")
    assert sorted(named) == sorted(files | folders)


def test_the_documentation_shows_the_same_tables() -> None:
    """If this fails: python -m benchmarks.house --map."""
    assert MAP_PAGE.read_text("utf-8") == page_with_map()


def test_what_both_trainers_share_knows_no_framework() -> None:
    shared = re.findall(r"`(\w+)`", (ast.get_docstring(train_docstring()) or "").split("| file")[0])
    names = [f"mlx_specstream.train.{name}" for name in shared if name != "convert"]
    assert len(names) >= 12
    for name in names:
        words = [
            alias.name if isinstance(node, ast.Import) else (node.module or "")
            for node in ast.walk(ast.parse(modules()[name].read_text("utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
            for alias in node.names
        ]
        assert not {word.split(".")[0] for word in words} & {"mlx", "torch"}, name


def test_every_room_has_its_place() -> None:
    rooms = {room for arrow in found() for room in (arrow.source_room, arrow.target_room)}
    assert rooms <= set(ORDER)


def test_no_import_runs_up() -> None:
    rank = {room: index for index, room in enumerate(ORDER)}
    up = [arrow for arrow in found() if rank[arrow.target_room] > rank[arrow.source_room]]
    assert up == []


def test_imports_inside_the_package_are_relative() -> None:
    absolute = [
        (name, node.lineno)
        for name, path in modules().items()
        if name.startswith("mlx_specstream.")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
        and node.level == 0
        and (node.module or "").split(".")[0] == "mlx_specstream"
    ]
    assert absolute == []


def test_the_house_stays_small_enough_for_one_head() -> None:
    assert len(top_level()) <= 24
    assert len(top_level_pairs(found())) <= 110


def test_few_class_names_are_used_twice() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for name, home in class_names():
        homes[name].append(home)
    assert sum(len(found) > 1 for found in homes.values()) <= 5
